"""`python -m harmbench_vaccine` is `hbv`: the form that torchrun and accelerate launch take."""

from harmbench_vaccine.cli import main

main()
