"""`feddm-supervise`: keeps a deployment's run going until it is finished.

Starting a run for the first time is in `server_app.launch`.
"""
