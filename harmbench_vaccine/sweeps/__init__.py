"""Sweeps: the runs of a suite, divided among workers that share nothing but the store."""
