"""Pages and tables from finished or running runs: report, tables, model card, charts, warnings.

What is measured, and how, is in `task.evaluation`.
"""
