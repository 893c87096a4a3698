"""The folder of a run: `layout` says what lies where, `writer` writes it and `run` reads it.

A number that was measured or counted is a `records.Record`; `first_schema` makes them of what
older runs hold. `checkpoint` keeps weights, `resume` says which runs may go on, and `commands`
names the command that repeats one. What is measured is decided in `task.evaluation`, pages are
made in `task.reporting`.
"""
