import logging

from tealightning.cli.console import quiet_startup


def test_advertisements_are_dropped_and_all_else_is_kept(caplog):
    quiet_startup()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with caplog.at_level(logging.INFO, logger.name):
        logger.info("💡 Tip: For seamless cloud logging, try installing another product")
        logger.info("`Trainer.fit` stopped: `max_steps=%d` reached.", 3)
    assert [record.getMessage() for record in caplog.records] == ["`Trainer.fit` stopped: `max_steps=3` reached."]
