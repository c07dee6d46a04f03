import shutil
import warnings

from tealightning.reliability.checkpoint_files import warn_if_the_next_may_not_fit


def test_disk_that_would_not_take_another_checkpoint_is_announced(tmp_path, monkeypatch):
    (tmp_path / "step=000001.ckpt").write_bytes(bytes(1000))
    usage = shutil.disk_usage(tmp_path)
    for free, warned in ((1001, 0), (999, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            warn_if_the_next_may_not_fit(tmp_path / "step=000001.ckpt")
        assert len(told) == warned
