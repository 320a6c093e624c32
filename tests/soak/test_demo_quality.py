"""The promise of the demo, in full: `make soak` trains it and holds its figures against the baselines."""

import pytest

from lrm_pl.cli.lightning_cli import LRMCLI
from lrm_pl.cli.report import Report


@pytest.mark.soak
@pytest.mark.blender
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("default")
def test_the_demo_beats_white_by_3_db_on_unseen_views_and_by_2_db_on_held_out_objects(
    root, tmp_path, render_command
):
    render_command(root / "data_tools" / "demo_assets", tmp_path / "demo")
    cli = LRMCLI("fit", [
        "-c", str(root / "configs/experiment/demo.yaml"), "--data.folder", str(tmp_path / "demo"),
        "--trainer.logger.init_args.save_dir", str(tmp_path),
    ], records=False)  # fmt: skip
    cli.before_fit()
    cli.trainer.fit(cli.model, cli.datamodule)
    cli.after_fit()
    pooled = {
        name: {row: scores.psnr_pooled for row, scores in report.rows.items()}
        for name, report in cli.reports.items()
        if isinstance(report, Report)
    }
    unseen, heldout = pooled["unseen"], pooled["heldout"]
    assert unseen["model"] >= unseen["white image"] + 3
    assert unseen["model"] == max(unseen.values())
    assert heldout["model"] >= heldout["white image"] + 2
    assert heldout["model"] > heldout["mean training image"]
