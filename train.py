"""Train a language model: `python train.py +moe=512e`.

Every value under configs/ can be set on the command line (`train.num_steps=800 seed=1`). `+moe=` gives the model
experts, `-m` starts one run per combination of comma-separated values (`-m +moe=8e,32e seed=0,1`). Repeating a command
continues its run if it was stopped, and says so if it is complete.
"""

import sys

from moe.compose import compose, expand_multirun, usage
from moe.training.exit_status import end_with


def main(arguments: list[str]) -> None:
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(f"{__doc__}\n{usage()}\n")
        return
    runs = expand_multirun(arguments)
    configs = [compose(overrides) for overrides in runs]  # Hydra stops here: checked RunConfigs
    from moe.multirun import main as run  # torch takes seconds to load, and a mistyped key should not wait for it

    run(runs, configs)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        end_with(error)
    except KeyboardInterrupt:  # before the first step: from then on a run saves and says so
        sys.exit(130)
