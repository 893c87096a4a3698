"""A ClientApp that goes wrong as the environment of its node says: FEDDM_FAULTS="raise nan hang".

The first word is for round 1, and so on; "none", or no word left, is the real ClientApp. A test
puts this file into a copy of the app as `client_app/faulty.py`.
"""

import os
import signal
import time

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from client_app import app as real
from client_app.failures import failures_stay_local

app = ClientApp()
app.query()(real.introduce)
app.evaluate()(real.evaluate)
app.evaluate("scores")(real.score)


@app.train()
@failures_stay_local
def train(message: Message, context: Context) -> Message:
    faults = os.environ.get("FEDDM_FAULTS", "").split()
    server_round = int(message.content["config"]["server-round"])
    fault = faults[server_round - 1] if server_round <= len(faults) else "none"
    if fault == "raise":
        raise ValueError("no such scan: patient-4711-scan-3.png")
    if fault == "memory":
        torch.empty(1 << 60)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        time.sleep(3600)
    reply = real.train(message, context)
    if fault in ("nan", "shape", "norm"):
        arrays = reply.content["arrays"]
        broken = {"nan": lambda w: w * np.nan, "shape": lambda w: w[:-1], "norm": lambda w: w + 10}
        weights: NDArray[np.float32] = broken[fault](arrays["packed"].numpy())
        reply.content["arrays"] = ArrayRecord({"packed": Array(weights)})
    elif fault == "surplus":
        # What no round asks for, and what Flower holds and hands on all the same.
        mebibytes = int(os.environ["FEDDM_SURPLUS_MIB"])
        noise = np.random.default_rng(server_round).bytes(mebibytes << 20)
        reply.content["surplus"] = ArrayRecord({"noise": Array(np.frombuffer(noise, np.uint8))})
    elif fault not in ("none", "killed"):
        raise RuntimeError(f"no such fault: {fault}")
    return reply
