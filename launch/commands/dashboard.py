"""Write the W&B workspace of a project: a panel for each metric of a run, by section, and a comparison of runs.

The runs may be synced later: the panels show every run of the project."""

import argparse

from launch.arguments import path

EXAMPLES = """\
  qarl dashboard runs/quickstart --entity my-team
  qarl dashboard runs/quickstart --entity my-team --json workspace.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", type=path, help="folder of a run, whose metrics are shown")
    parser.add_argument("--entity", required=True, help="W&B user or team that has the project")
    parser.add_argument("--json", metavar="FILE", type=path, help="write the workspace into a file; send nothing")


def run(args: argparse.Namespace) -> int:
    from launch.run.resume import CONFIG_FILE
    from launch.run.tracking import METRICS_FILE, read_log
    from launch.run.workspace import make_workspace, save
    from qarl.config.io import load_config
    from qarl.errors import DataError

    rows = read_log(args.run_dir / METRICS_FILE)
    names = {name for row in rows for name, value in row.items() if not isinstance(value, dict)} - {"step", "time"}
    if not names:
        raise DataError("no metrics", str(args.run_dir / METRICS_FILE), "nothing has been logged yet")
    project = load_config(args.run_dir / CONFIG_FILE).tracking.wandb_project
    workspace = make_workspace(args.entity, project, names)
    if args.json:
        args.json.write_text(workspace._to_model().model_dump_json(indent=1), encoding="utf-8")
    print(args.json or save(workspace))
    return 0
