"""Tasks with right answers: C-Eval, CMMLU, CALM, multiple choice, and those of lm-eval.

Read `config` first, then `loading` (configs to checked tasks) and `harness`, which runs one task on
any model that has lm-eval's interface.
"""
