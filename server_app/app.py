"""The ServerApp of feddm."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server_app.federated_run import FederatedRun
from server_app.log import log
from server_app.superlink import end_with_submitter
from task.config import load_run_config
from task.run_directory import RunDirectory

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train one model over all hospitals, or go on where an earlier start of the run ended."""
    end_with_submitter()
    directory = RunDirectory(load_run_config(context.run_config))
    log(f"results: {directory.path}")
    try:
        FederatedRun(grid, directory).run()
    finally:
        directory.close()
        log(f"results: {directory.path}")
