"""Breaks the program, a line at a time, and asks the test that should notice whether it does.

    python -m tests.faults                 # all; prints the table of tests/README.md
    python -m tests.faults sample 0 3      # the first three of sample.py

Each fault is applied to a copy of the project. A fault that its test does not see is an error.
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A test, and below it the faults that it notices: script: what is wrong | the code | the fault
TABLE = r"""
test_resume::test_stops_anywhere_in_epochs_and_schedule_change_no_bit
  train: torch's generator is not restored | torch.set_rng_state(state["torch"]) | pass
  train: NumPy's generator is not restored | np.random.set_state(state["numpy"]) | pass
  train: Python's generator is not restored | random.setstate(state["python"]) | pass
  train: gradients of two steps are added | optimizer.zero_grad() | pass
  train: the optimizer starts again on resume | optimizer.load_state_dict( | dict(
  train: the loss scale starts again on resume | self.scaler.load_state_dict( | dict(
test_resume::test_a_checkpoint_reaches_the_disk_before_its_name_and_the_name_after
  train: a checkpoint is not flushed to the disk | prepare.fsync(temporary) | pass
  train: a checkpoint's name is not flushed | prepare.fsync(path.parent) | pass
  train: a checkpoint is written in place | path.with_name("checkpoint.tmp") | path
test_torture::test_nothing_is_lost[checkpoints]
  train: the digest is not compared | if raw[-TAIL:].tobytes() != | if b"" ==
test_torture::test_nothing_is_lost[strangers]
  train: a checkpoint may hold code | weights_only=True | weights_only=False
test_train::test_batches_are_consecutive_tokens_in_the_order_of_the_epochs_shared_by_all_processes
  train: a batch begins one token late | start:start + T + 1] | start + 1:start + T + 2]
  train: sequences are counted by steps | self.sequence + size | self.sequence + 1
  train: epochs are not counted | self.epoch += epochs | pass
test_train::test_the_order_and_the_cuts_change_from_epoch_to_epoch_and_reach_everything
  train: every epoch has the same order | ((seed, epoch)) | ((seed, 0))
  train: the cuts never move | rng.integers(n - blocks * T) + T | 0 + T
test_train::test_batches_are_consecutive_tokens_in_the_order_of_the_epochs_shared_by_all_processes
  train: all processes read the same rows | run.sequence + RANK * share | run.sequence
test_resume::test_tokens_and_the_place_in_the_data_stay_true_when_the_batch_size_changes
  train: tokens start again on resume | tokens: int = 0 | tokens = 0
test_resume::test_another_block_size_begins_an_epoch_anew
  train: another block size keeps the place | self.epoch += self.sequence > 0 | return
test_train::test_the_learning_rate_warms_up_follows_a_cosine_and_stays_at_the_minimum
  train: the rate is one step late | (step + 1) / warmup | step / warmup
  train: the warm-up counts as decay | (step - warmup) / (end - warmup) | step / end
  train: min_lr is not held | return lowest | return 0.0
test_train::test_what_one_types_wrong_is_one_line_and_exit_2
  train: a rate below min_lr climbs | min_lr <= learning_rate | True
test_train::test_weight_decay_is_on_matrices_only_and_the_optimizer_has_every_parameter
  train: the norms decay, too | "weight_decay": 0.0} | "weight_decay": config.weight_decay}
test_train::test_muon_brings_singular_values_near_one_and_none_far_beyond
  train: Muon explodes where rounding passes one | x, beta=a) | x, beta=1.1 * a)
  train: so does a long matrix | .add_(a) | .add_(1.1 * a)
test_train::test_muon_moves_each_matrix_by_what_is_near_its_gradients_orthogonal_factor
  train: Muon's tall matrices move too little | max(1, rows / columns) ** 0.5 | 1.0
test_train::test_gradients_are_clipped_to_the_norm_and_the_logged_norm_is_that_before
  train: nothing is clipped | config.grad_clip or math.inf | math.inf
test_train::test_micro_batches_change_memory_and_not_the_run
  train: micro-batches are summed | (part / len(parts)).backward() | (part).backward()
test_train::test_a_loss_that_is_not_finite_stops_the_run_before_the_optimizer_step
  train: a loss of NaN changes the weights | if not math.isfinite(loss) or | if False and
test_train::test_an_infinite_gradient_in_fp16_stops_every_optimizer_and_lowers_the_scale
  train: Muon steps on fp16's infinite gradient | if math.isfinite(norm): | if True:
test_distributed::test_two_processes_have_the_losses_of_one
  train: processes sum their losses | loss.item() / WORLD_SIZE | loss.item()
test_train::test_the_held_out_loss_is_the_mean_over_the_whole_split_each_token_once
  train: a held-out window is left out | first in range(RANK * B * T, n | first in range(B * T, n
test_train::test_evaluation_and_samples_do_not_touch_the_training
  train: a sample draws from the training's generator | generator=generator) | generator=None)
test_train::test_the_best_held_out_loss_is_kept_and_named
  train: the best is the worst | row["val_loss"] < run.best | row["val_loss"] > run.best
  train: the best checkpoint is deleted | if not run.best or step_of(path) != run.best["step"]: | if True:
test_train::test_the_newest_checkpoints_are_kept
  train: the one before the newest is deleted | [:-run.config.keep_checkpoints] | [:-1]
test_resume::test_from_an_older_checkpoint_the_steps_repeat_and_later_files_are_set_aside
  train: steps beyond the checkpoint stay in metrics.jsonl | int(step[1]) > run.step | False
test_resume::test_a_checkpoint_copied_alone_resumes_and_no_step_is_logged_twice
  train: rows are counted, not read | int(step[1]) > run.step | size > 99 * run.step
test_resume::test_from_an_older_checkpoint_the_steps_repeat_and_later_files_are_set_aside
  train: later checkpoints are not set aside | if step_of(path) > run.step: | if False:
test_torture::test_nothing_is_lost[signals]
  train: a signal is not heeded | signals.append(signum) | pass
  train: a stopped run exits with 0 | raise SystemExit(code) | raise SystemExit(0)
test_resume::test_a_second_process_is_refused_and_the_first_one_never_notices
  train: two processes write one run | (out / ".lock").exists(): | False:
test_resume::test_the_run_is_a_whole_whatever_became_of_its_data
  train: another tokenizer is taken | if "tokenizer" in changed: | if False:
  sample: any tokenizer is taken | prepare.digest(folder / "tokenizer.json").startswith(state["data"]["tokenizer"]) | True
test_resume::test_other_data_are_refused_unless_named
  train: other data are taken | "val"} and not is_data_typed: | "val"} and False:
test_resume::test_where_the_bits_cannot_be_the_same_a_resume_names_why_and_goes_on
  train: changes of the run are not named | if changes: | if False:
test_model::test_logits_equal_transformers_at_other_sizes
  model: eps is left out |  + self.eps) | )
  model: the rotation turns the other way | ((-angles, angles) | ((angles, -angles)
  model: attention sees the future | is_causal=True | is_causal=False
  model: attention reads what is not normalised | (self.input_layernorm(x) | ((x)
test_model::test_it_has_134_515_008_parameters_with_the_names_and_shapes_of_transformers
  model: the head is not tied | self.lm_head = self.model.embed_tokens | self.lm_head = Linear(576, 49152)
test_model::test_the_attention_of_the_compiled_cpu_path_is_attention
  model: the compiled mask is one key too wide | triu(start + 1) | triu(start + 2)
test_model::test_the_fused_loss_equals_cross_entropy_in_value_and_gradients
  model: ignored targets count | count = (targets >= 0).sum() | count = (targets >= -100).sum()
test_model::test_tokens_come_with_the_probabilities_of_the_softmax
  model: top_p drops the token that crosses the line | before >= top_p | before + probs > top_p
test_model::test_more_positions_than_the_model_has_are_a_clear_error
  model: one position too many | if T > limit: | if T > limit + 1:
test_model::test_bf16_is_picked_where_the_machine_has_it_and_each_process_has_its_own_gpu
  model: an old GPU gets bf16 | >= (8, 0) | >= (7, 0)
test_prepare::test_every_file_reaches_the_disk_before_the_folder_takes_its_name
  prepare: a file is not flushed to the disk | os.fsync(handle) | pass
test_prepare::test_damage_is_told_in_one_line
  prepare: a changed meta.json is taken | if changed: | if False:
  prepare: an id beyond the vocabulary is let through | if largest >= | if False and largest >=
test_prepare::test_every_byte_is_kept_but_the_byte_order_mark
  prepare: the byte order mark stays | .removeprefix("\ufeff") | .removeprefix("")
test_sample::test_a_stop_text_over_several_tokens_is_never_shown_not_even_its_beginning
  sample: a stop text is shown | waiting[:min(found)] | waiting
  sample: the beginning of a stop text is shown | - held_back) | - 0)
test_sample::test_standard_output_is_the_prompt_and_the_text_and_nothing_else
  sample: the prompt is cut | print(texts[0], end | print(texts[0][1:], end
test_sample::test_it_ends_at_endoftext
  sample: text goes on after its end | if token == eos: | if False:
test_sample::test_standard_output_is_the_prompt_and_the_text_and_nothing_else
  sample: the seed is not used | .manual_seed(seed) | .manual_seed(1)
"""


def is_caught(script, code, fault, test):
    """Whether the test fails with the fault in place."""
    with tempfile.TemporaryDirectory() as folder:
        ignored = shutil.ignore_patterns(".git", "out*", "data", "__pycache__")
        path = shutil.copytree(ROOT, Path(folder, "project"), ignore=ignored) / f"{script}.py"
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(code, fault, 1), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-xq", "tests/" + test.replace("::", ".py::")]
        done = subprocess.run(command, cwd=path.parent, capture_output=True)
        return code in text and done.returncode == 1


def main():
    wanted, first, last = [*sys.argv[1:], *["", 0, 999][len(sys.argv) - 1:]]
    chosen, missed, test = [], [], ""
    for row in TABLE.strip().splitlines():
        if not row.startswith("  "):
            test = row
        elif row.strip().startswith(wanted):
            chosen.append([*row.strip().replace(r"\n", "\n").split(" | "), test])
    for what, code, fault, test in chosen[int(first):int(last)]:
        if is_caught(what.partition(":")[0], code, fault, test):
            print(f"| `{what.replace(':', '.py`:', 1)} | `{test}` |", flush=True)
        else:
            missed.append(what)
    sys.exit("not caught: " + "; ".join(missed) if missed else 0)


if __name__ == "__main__":
    main()
