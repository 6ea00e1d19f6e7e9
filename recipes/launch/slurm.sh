#!/usr/bin/env bash
#SBATCH --job-name=distill --output=%x-%j.out --open-mode=append
#SBATCH --nodes=1 --ntasks=1 --gpus-per-node=8 --cpus-per-task=32 --mem=128G
#SBATCH --time=04:00:00 --signal=B:USR1@180 --requeue
#
# Training and export on one machine of a SLURM cluster. Submit it in the clone, whose .venv has [train]:
#
#   IMAGENET=s3://BUCKET/imagenet/train sbatch recipes/launch/slurm.sh \
#       save_folder=s3://BUCKET/runs/distill train_loader.local=/mnt/nvme/imagenet/train
#
# The job saves and enters the queue again three minutes before its time ends; SLURM itself requeues a job that is
# preempted or whose machine fails. Each time, the run resumes. To end it with a checkpoint, signal the script alone, by
# scancel --batch --signal=TERM JOB: plain scancel and a preemption signal every process, and kill them after KillWait or
# GraceTime, often 30 seconds; then the run resumes from its last checkpoint.
set -uo pipefail

.venv/bin/python recipes/launch/run.py yamls/distill.yaml "$@" &
run=$!
time_is_up=false
trap 'kill -TERM "$run"' TERM
trap 'time_is_up=true; kill -TERM "$run"' USR1

while kill -0 "$run" 2>/dev/null; do
    wait "$run" # a signal ends this wait, but not the run
done
wait "$run"
status=$?
if [ "$status" = 143 ] && "$time_is_up"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
