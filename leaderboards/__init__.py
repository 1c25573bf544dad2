"""Suites that ship with the package: YAML files for `hbv sweep`, read by `harmbench_vaccine.sweeps.suite`."""
