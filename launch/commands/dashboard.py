"""Write the W&B workspace of a project: panels for the metrics of a run, by section, and a comparison of runs.

The runs may be synced later: the panels show every run of the project."""

import argparse

from launch.arguments import out_file, path

EXAMPLES = """\
  qarl dashboard runs/quickstart --entity my-team
  qarl dashboard runs/quickstart --entity my-team --json workspace.json
  qarl dashboard runs/quickstart --preview workspace.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", type=path, help="folder of a run, whose metrics are shown")
    parser.add_argument("--entity", default="", help="W&B user or team that has the project")
    parser.add_argument("--json", metavar="FILE", type=out_file, help="write the workspace into a file; send nothing")
    parser.add_argument(
        "--preview", metavar="FILE", type=out_file, help="draw the panels with the run's own W&B files; send nothing"
    )


def run(args: argparse.Namespace) -> int:
    from launch.run.files import write_whole
    from launch.run.resume import config_of_run
    from launch.run.tracking import METRICS_FILE, SAMPLES_FILE, read_log
    from qarl.errors import ConfigError, DataError

    written = [file for file in (args.preview, args.json) if file]
    if not written and not args.entity:
        raise ConfigError(
            "is required: the user or team that has the project", "--entity", "--preview and --json need none"
        )
    project = config_of_run(args.run_dir).tracking.wandb_project
    rows = read_log(args.run_dir / METRICS_FILE)
    # W&B draws a histogram on the page of a run, but in no panel of a project.
    names = {name for row in rows for name, value in row.items() if not isinstance(value, dict)} - {"step", "time"}
    if not names:
        raise DataError("no metrics", str(args.run_dir / METRICS_FILE), "nothing has been logged yet")
    from launch.run.workspace import make_workspace, save  # late: wandb is slow to import

    tables = {row["table"] for row in read_log(args.run_dir / SAMPLES_FILE) if isinstance(row.get("table"), str)}
    workspace = make_workspace(args.entity, project, names, tables)
    for file in written:
        file.parent.mkdir(parents=True, exist_ok=True)
    if args.preview:
        from launch.run.preview import preview

        write_whole(args.preview, preview(workspace, args.run_dir))
    if args.json:
        write_whole(args.json, workspace._to_model().model_dump_json(indent=1))
    print(*written or [save(workspace)], sep="\n")
    return 0
