"""Nothing is lost, whatever happens: the short form of each part of tests/torture.py."""
import pytest

from tests import torture


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def quiet(text):
    pass


def test_killed_again_and_again_ends_with_the_same_bits(folder):
    row = torture.kills(folder, 5, steps=60, say=quiet)
    assert row.injected == 5 and row.lost == 0, row


def test_killed_in_preparation_leaves_whole_data_or_none(folder):
    row = torture.kill_preparation(folder, 2)
    assert row.lost == 0, row


@pytest.mark.parametrize("fault", [torture.full_disk, torture.read_only, torture.failed_save])
def test_disk_that_takes_no_more(folder, fault):
    try:
        row = fault(folder, (100_000,)) if fault is torture.full_disk else fault(folder)
    except torture.Unavailable as e:
        pytest.skip(str(e))
    assert row.resumed == 1 and row.lost == 0, row


def test_any_damage_to_the_newest_checkpoint_is_recognised(folder):
    row = torture.damaged_checkpoints(folder, 40)
    assert row.injected > 400 and row.lost == 0, row


def test_damaged_checkpoint_is_named_and_the_one_before_used(folder):
    row = torture.damaged_then_resumed(folder, real=False)
    assert row.resumed == 2 and row.lost == 0, row


def test_damaged_data_is_refused_before_the_first_step(folder):
    assert torture.damaged_data(folder).injected > 40


def test_signals(folder):
    row = torture.signals(folder, [(("SIGINT",), "first step"), (("SIGTERM",), "evaluation"), (("SIGTERM",), "save"),
                                   (("SIGINT", "SIGINT"), "step")], say=quiet)
    assert row.resumed == 4 and row.lost == 0, row


@pytest.mark.slow
def test_signal_while_compiling(folder):
    row = torture.signals(folder, torture.COMPILING[:1], say=quiet, compiled=True)
    assert row.resumed == 1 and row.lost == 0, row


def test_second_process_on_an_out_dir_is_refused(folder):
    assert torture.second_process(folder).lost == 0


def test_strangers_files_run_no_code(folder):
    assert torture.strangers(folder).injected > 60


def test_another_machine_is_named_and_another_model_refused(folder):
    assert torture.other_machine(folder).resumed == 8


def test_another_thread_count_is_named(folder):
    torture.other_threads(folder)


def test_memory_stays_flat(folder):
    torture.memory(folder, 300)


def test_random_input_ends_in_success_or_one_line(folder):
    row = torture.fuzz(folder, 120, say=quiet)
    assert row.injected == 120 and row.lost == 0, row


def test_random_commands_end_in_success_or_one_line(folder):
    row = torture.commands(folder, 6, say=quiet)
    assert row.injected == 6 and row.lost == 0, row
