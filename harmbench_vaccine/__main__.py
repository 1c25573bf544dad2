"""`python -m harmbench_vaccine` is `hbv`: the form that torchrun and accelerate launch take."""

from .cli import main

main()
