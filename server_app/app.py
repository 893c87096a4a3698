"""The ServerApp of feddm."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server_app.exchange import is_simulation
from server_app.federated import FederatedTraining
from server_app.launch.superlink import end_with_submitter
from server_app.log import log
from server_app.secure_training import SecureTraining
from server_app.supervisor.submission import write_submission
from task.checks import require
from task.config import load_run_config, settle_frozen_file
from task.runs.writer import RunWriter

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train one model over all hospitals, or go on where an earlier start of the run ended."""
    end_with_submitter()
    config = load_run_config(context.run_config, has_images=is_simulation(grid))
    require(
        config.train.mode == "federated",
        "train.mode",
        "federated under `flwr run` (feddm-train trains the centralized baseline)",
        config.train.mode,
    )
    directory = RunWriter(settle_frozen_file(config))
    log(f"results: {directory.path}")
    try:
        write_submission(directory, context.run_id, context.run_config)
        secure = config.federation.secure_aggregation
        (SecureTraining if secure else FederatedTraining)(grid, directory).run()
    except Exception as error:
        # Flower prints where it was raised, with this at the end of many lines.
        log(f"the run fails: {' '.join(str(error).split()) or type(error).__name__}")
        raise
    finally:
        directory.close()
        log(f"results: {directory.path}")
