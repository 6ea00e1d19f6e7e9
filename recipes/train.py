"""Distill a student with the settings in a YAML.

usage: composer recipes/train.py FILE.yaml [dotted.key=value …]

    composer recipes/train.py yamls/quickstart.yaml
    composer recipes/train.py yamls/quickstart.yaml run_name=longer max_duration=10ep student.depth=2
    composer recipes/train.py yamls/distill.yaml train_loader.remote=s3://BUCKET/imagenet/train

composer starts a process for each GPU; python trains in one process. `d2v fields training` lists every field.
Run the same command again to resume an interrupted run.
"""

from d2v_composer.commands.train import train as main
from d2v_composer.system import command_line

if __name__ == "__main__":
    command_line.begin(__doc__)
    command_line.run(main)
