"""Cases that take long to compile on a software driver, and what covers the same without them.

`make test` and `make parity` leave them to `make parity-long`, and to `make test-dawn` what needs
no judge. Of each kernel, body and option others stay; the comments say which.
"""

from __future__ import annotations

from collections.abc import Mapping

# Of a file, cases by the ends of their ids.
LONG: Mapping[str, tuple[str, ...]] = {
    # Another window, split and tile of each kind; heads of 512 in the check of every kernel.
    "tests/backward/test_attention.py": (
        "test_f16_tensors[lengths2-shape2-tile2]",
        "test_f16_tensors[lengths3-shape3-tile3]",
        "test_attention_backward[lengths0-shape0-tile0]",
        "test_attention_backward[lengths3-shape3-tile3]",
        "test_attention_backward[lengths4-shape4-tile4]",
        "test_attention_backward[lengths8-shape8-tile8]",
        "test_attention_backward[lengths12-shape12-tile12]",
        "test_split_heads_and_tiles_of_as_many_teams_agree_bit_for_bit",
    ),
    # Other pairs of groups, on plain kernels and on matrix units.
    "tests/backward/test_lora_pending.py": (
        "test_of_a_copy_in_f16[True-False]",
        "test_columns_that_are_scaled[65 rows, 40 in use]",
        "test_columns_that_are_scaled[65 rows, 0 in use]",
        "test_as_two_dispatches[130 rows, 129 in use]",
        "test_as_two_dispatches[65 rows, 40 in use]",
        "test_as_two_dispatches[65 rows, 0 in use]",
        "test_as_two_dispatches_on_matrix_units[65 rows, 40 in use]",
        "test_as_two_dispatches_on_matrix_units[65 rows, 0 in use]",
        "test_as_two_dispatches_on_matrix_units[130 rows, 129 in use]",
    ),
    # Another case of products on matrix units in f16, and in pairs.
    "tests/forward/test_matmul_matrix.py": ("test_on_any_driver[a large rank]",),
    "tests/forward/test_matmul_paired.py": (
        "test_on_any_driver[stretches]",
        "test_at_most_twice_the_plain_error[14336-to the input]",
        "test_at_most_twice_the_plain_error[32-to the input]",
        "test_at_most_twice_the_plain_error[32-forward]",
    ),
    "tests/forward/test_matmul_prepared.py": (
        "test_the_same_to_the_last_bit[in whole steps]",
        "test_on_any_driver[two parts and a large rank]",
        "test_on_any_driver[weights of f16, scaled and capped]",
        "test_the_same_to_the_last_bit[in none]",
    ),
    "tests/forward/test_matmul_powers.py": (
        "test_both_directions[tiled, quantized, two parts-f32]",
        "test_both_directions[matrix-f32]",
        "test_both_directions[matrix, one row-f16]",
        "test_both_directions[matrix, stretches-f32]",
    ),
    # Bits that don't depend on the place are looked at with plain kernels; values on units stay.
    "tests/forward/test_attention_matrix.py": (
        "test_an_example_gives_the_same_bits_wherever_it_lies_and_whatever_the_block",
    ),
    # The same criterion and vocabulary on a CPU's lanes, others on a GPU's.
    "tests/forward/test_cross_entropy.py": ("test_criteria[criterion2-9001-GPU's lanes]",),
    # A llama in f32; Gemma's steps in f16 by tests of precision.
    "tests/forward/test_matmul_norm.py": ("test_a_step_is_the_same[gemma2-f16]",),
    # Models whose one-row path has the kernels of those that stay.
    "tests/lora/generation/test_generator.py": (
        "test_token_by_token[gemma2_q8_0]",
        "test_token_by_token[qwen3]",
        "test_token_by_token[llama_odd]",
        "test_token_by_token[llama_bias]",
        "test_token_by_token[llama_head_dim]",
    ),
    # Plain tiles have the same powers; the kernels' own tests have them on units.
    "tests/lora/training/test_range.py": (
        "test_loss_and_gradients[llama bias]",
        "test_loss_and_gradients[llama norms]",
        "test_loss_and_gradients[gemma3 outputs]",
        "test_eight_steps[tiled-gemma3 stream]",
        "test_loss_and_gradients[llama up, matrix]",
        "test_loss_and_gradients[qwen3 all]",
    ),
    "tests/lora/training/test_precision.py": (
        "test_losses_and_gradients[gemma3-wide]",
        "test_losses_and_gradients[lfm2-wide]",
        "test_fifty_steps[tiled]",
        "test_the_delta_rule_on_matrix_units[wide]",
    ),
    # Plans that no tuning made, and a run that is killed under other data.
    "tests/lora/training/test_checkpoint.py": ("test_resumed_with_the_plans_of_then[auto]",),
    "tests/lora/training/test_run.py": ("test_killed_and_resumed_equals_uninterrupted[{last: 1}]",),
    # Sessions side by side, and what is closed.
    "tests/lora/training/test_sessions.py": ("test_a_hundred_sessions_in_turn",),
    # Every kernel against its reference stays (tests/lora/commands/test_devices.py).
    "tests/lora/checks/test_checked.py": (
        "test_every_kernel_computes_the_same_when_it_is_checked",
    ),
    # What is measured, without a GPU.
    "tests/benchmarks/test_kernels.py": ("test_a_step_of_a_tiny_model",),
    "tests/benchmarks/test_vs_peft.py": (
        "test_a_report",
        "test_loss_curves_of_two_precisions_part_a_little",
        "test_loss_curves_fall_and_are_those_of_training",
    ),
    "tests/benchmarks/test_watching.py": ("test_what_watching_costs",),
    # Of real models and judges: SmolLM2's whole numbers, its adapter on its own quantized base, the
    # same losses by all; pairs of f16 against float64.
    "tests/parity/test_export.py": ("test_adapter_on_the_f32_base[smollm2]",),
    "tests/parity/test_int_rows.py": ("test_whole_numbers_are_as_good_as_f32[gemma3]",),
    "tests/parity/test_paired.py": (
        "test_against_peft[paired-llama_head]",
        "test_against_peft[prepared-llama_head]",
    ),
    # The other type of heads of 64 and of 48 columns.
    "tests/backward/test_delta_matrix.py": (
        "[False-DeltaSizes(key_heads=1, value_heads=4, head_size=64)-(0, 5, 150, 214, 300)]",
        "[True-DeltaSizes(key_heads=4, value_heads=12, head_size=48)-(0, 1, 130)]",
    ),
    # Two seeds stay.
    "tests/test_order.py": (
        "test_files_are_the_same_under_some_seeds[five]",
    ),
}  # fmt: skip
