"""Helpers that several test modules share; no test module imports from another one.

`tiny` has models, rows, batches and training stages in memory; `world` writes a model, a judge, data sets and a
protocol to a folder. `plain_math`, `autograd`, `hooks` and `optimizers` state equations independently of the package;
`compare` has tolerances; `trainer` interrupts training runs; `ranks` trains over two processes; `cli` runs `hbv` in
this process or in another one.
"""
