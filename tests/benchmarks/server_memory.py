"""Memory of the server by the number of virtual clients, beside Flower's own FedAvg."""

import subprocess
import sys
import tempfile
from contextlib import closing

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from server_app.federated import FederatedTraining
from server_app.messages import packed_record
from task.code_version import code_fingerprint
from task.config import load_run_config
from task.generators.registry import build_generator
from task.protocol.wire import Key, WeightLayout
from task.runs.writer import RunWriter
from tests.benchmarks.processes import CHECKOUT, Peak, own_memory
from tests.benchmarks.report import Figures

RUN = {
    "overrides": "model=feddm",
    "run_name": "run",
    "data.channels": 3,
    "data.image_size": 32,
    "train.device": "cpu",
    "train.precision": "float32",
    "partition.beta": "inf",
}
TIMEOUT_SECONDS = 900


def measure(*, full: bool, device: str = "auto") -> Figures:
    """Let virtual clients reply the paper's 23.2 million weights without training.

    Each figure is that of one round in a new process which holds, as under feddm-train, Flower's
    in-memory SuperLink, its driver of Ray and the server; the clients are processes of Ray's. Ray's
    store of objects is memory shared with them, and not counted.

    Args:
        full: Flower's FedAvg with 10 and 50 clients as well.
        device: not used.

    Returns:
        `server.peak_mib` by the number of clients, and `server.fedavg_peak_mib`, of Flower's
        FedAvg over the same replies, which it keeps until it has all.
    """
    ours = {f"server.peak_mib.{n}": peak_of("feddm", n) for n in (10, 50, 200)}
    counts = (10, 50) if full else ()
    counted: Figures = {
        "server.counted": "the process of server, SuperLink and Ray's driver, without Ray's store"
    }
    return counted | ours | {f"server.fedavg_peak_mib.{n}": peak_of("fedavg", n) for n in counts}


def peak_of(server: str, clients: int) -> float:
    """Measure one round in a process of its own.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.server_memory", server, str(clients)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    last = (done.stdout.splitlines() or [""])[-1]
    if done.returncode != 0 or not last.startswith("peak_mib "):
        raise RuntimeError(f"{server} with {clients} clients failed: {done.stderr[-500:]}")
    return float(last.split()[1])


client = ClientApp()


@client.query()
def introduce(message: Message, context: Context) -> Message:
    """Answer as feddm's ClientApp does."""
    said = {key: int(context.node_config[key]) for key in (Key.PARTITION_ID, Key.NUM_PARTITIONS)}
    content = RecordDict({Key.CONFIG: ConfigRecord({Key.FINGERPRINT: code_fingerprint(), **said})})
    return Message(content, reply_to=message)


@client.train()
def send_back(message: Message, context: Context) -> Message:
    """Reply the weights that came."""
    metrics = MetricRecord({Key.NUM_EXAMPLES: 100, Key.LOSS: 1.0})
    content = RecordDict({Key.ARRAYS: message.content[Key.ARRAYS], Key.METRICS: metrics})
    return Message(content, reply_to=message)


def one_round(grid: Grid, server: str) -> None:
    """Play the round whose peak is measured."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_run_config({**RUN, "output_dir": folder})
        if server == "feddm":
            with closing(RunWriter(config)) as directory:
                run = FederatedTraining(grid, directory)
                run.prepare()
                run.train(1)
            return
    model = build_generator(config)
    arrays = packed_record(WeightLayout.of(model).pack(model.state_dict()))
    FedAvg(fraction_evaluate=0.0).start(grid, arrays, num_rounds=1)


def main(server: str, clients: int) -> None:
    """Measure one round and print its peak."""
    app = ServerApp()

    @app.main()
    def serve(grid: Grid, context: Context) -> None:
        one_round(grid, server)

    with Peak(own_memory, every=0.02) as peak:
        run_simulation(
            server_app=app,
            client_app=client,
            num_supernodes=clients,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        )
    print(f"peak_mib {peak.mib}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
