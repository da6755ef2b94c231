"""Scores of models: bits per byte of texts, tasks with right answers, and answers to read.

Read `results` for what an evaluation yields and `report` for the page that shows it. `tasks` reads
the questions and runs them through lm-evaluation-harness.
"""
