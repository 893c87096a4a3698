"""`feddm-supervise`: keeps a deployment's run going until it is finished.

`supervise` is the command, `decisions` says what a run asks for, and `submission` is what was
submitted to start it. Starting a run for the first time is in `server_app.launch`.
"""
