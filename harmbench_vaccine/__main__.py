"""Run `hbv` as `python -m harmbench_vaccine`, the form that torchrun and accelerate launch require."""

from harmbench_vaccine.cli import main

main()
