"""Nothing is lost, whatever happens: the short form of each part of tests/torture.py."""
import pytest

from tests import torture


def test_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    row = torture.kills(tmp_path, 5, steps=60)
    assert row.injected == 5 and row.lost == 0, row


def test_killed_in_preparation_leaves_whole_data_or_none(tmp_path):
    row = torture.kill_preparation(tmp_path, 2)
    assert row.lost == 0, row


@pytest.mark.parametrize("fault, argv", [(torture.full_disk, [(100_000,)]), (torture.read_only, []),
                                         (torture.failed_save, [])], ids=lambda x: getattr(x, "__name__", ""))
def test_disk_that_takes_no_more(tmp_path, fault, argv):
    try:
        row = fault(tmp_path, *argv)
    except torture.Unavailable as e:
        pytest.skip(str(e))
    assert row.resumed == 1 and row.lost == 0, row


def test_any_damage_to_the_newest_checkpoint_is_recognised(tmp_path):
    row = torture.damaged_checkpoints(tmp_path, 40)
    assert row.injected > 400 and row.lost == 0, row


def test_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path):
    row = torture.damaged_then_resumed(tmp_path, real=False)
    assert row.resumed == 2 and row.lost == 0, row


def test_damaged_data_is_refused_before_the_first_step(tmp_path):
    row = torture.damaged_data(tmp_path)
    assert row.injected > 40 and row.lost == 0, row


def test_signals(tmp_path):
    row = torture.signals(tmp_path, [(("SIGINT",), "the first step"), (("SIGTERM",), "an evaluation"),
                                     (("SIGHUP",), "a save"), (("SIGINT", "SIGINT"), "a step")])
    assert row.resumed == 4 and row.lost == 0, row


@pytest.mark.slow
def test_signal_while_compiling(tmp_path):
    row = torture.signals(tmp_path, torture.COMPILING[:1], compiled=True)
    assert row.resumed == 1 and row.lost == 0, row


def test_second_process_on_an_out_dir_is_refused(tmp_path):
    assert torture.second_process(tmp_path).lost == 0


def test_strangers_files_run_no_code(tmp_path):
    row = torture.strangers(tmp_path)
    assert row.injected > 60 and row.lost == 0, row


def test_another_machine_is_named_and_another_model_refused(tmp_path):
    row = torture.other_machine(tmp_path)
    assert row.resumed == 8 and row.lost == 0, row


def test_another_thread_count_is_named(tmp_path):
    torture.other_threads(tmp_path)


def test_memory_stays_flat(tmp_path):
    torture.memory(tmp_path, 300)


@pytest.mark.parametrize("real, n", [(False, 200), (True, 6)], ids=["here", "commands"])
def test_random_input_ends_in_success_or_one_line(tmp_path, real, n):
    row = torture.fuzz(tmp_path, n, real=real)
    assert row.injected == n and row.lost == 0, row
