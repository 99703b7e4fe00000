"""Cases that take long to compile on a software driver, and what covers the same without them.

`make test` and `make parity` leave them to `make parity-long`, and to `make test-dawn` what needs
no judge. Of each kernel, body and option others stay; the comments say which.
"""

from __future__ import annotations

from collections.abc import Mapping

# Of a file, cases by the ends of their ids.
LONG: Mapping[str, tuple[str, ...]] = {
    # Of kernels that differ in numbers alone Tint takes one in `make test`.
    "tests/shaders/test_translation.py": ("test_tint_takes_every_kernel[with all numbers]",),
    # Another window, split and tile of each kind; heads of 512 in the check of every kernel.
    "tests/backward/test_attention.py": (
        "test_attention_backward[lengths1-shape1-tile1]",
        "test_attention_backward[lengths2-shape2-tile2]",
        "test_attention_backward[lengths11-shape11-tile11]",
        "test_gradients_are_turned_back[True-8-last0]",
        "test_f16_tensors[lengths2-shape2-tile2]",
        "test_f16_tensors[lengths3-shape3-tile3]",
        "test_attention_backward[lengths0-shape0-tile0]",
        "test_attention_backward[lengths3-shape3-tile3]",
        "test_attention_backward[lengths4-shape4-tile4]",
        "test_attention_backward[lengths8-shape8-tile8]",
        "test_attention_backward[lengths12-shape12-tile12]",
        "test_split_heads_and_tiles_of_as_many_teams_agree_bit_for_bit",
        "test_attention_backward[lengths7-shape7-tile7]",
        "test_an_example_gives_the_same_bits_wherever_it_lies[tile0]",
    ),
    # Other pairs of groups, on plain kernels and on matrix units; columns that are scaled have a
    # check on units.
    "tests/backward/test_lora_pending.py": (
        "test_dropout[True]",
        "test_as_two_dispatches[7 rows, 3 in use]",
        "test_of_a_copy_in_f16[True-False]",
        "test_columns_that_are_scaled[65 rows, 40 in use]",
        "test_columns_that_are_scaled[65 rows, 0 in use]",
        "test_as_two_dispatches[130 rows, 129 in use]",
        "test_as_two_dispatches[65 rows, 40 in use]",
        "test_as_two_dispatches[65 rows, 0 in use]",
        "test_as_two_dispatches_on_matrix_units[65 rows, 40 in use]",
        "test_as_two_dispatches_on_matrix_units[65 rows, 0 in use]",
        "test_as_two_dispatches_on_matrix_units[130 rows, 129 in use]",
        "test_columns_that_are_scaled[7 rows, 3 in use]",
    ),
    # Another case of products on matrix units in f16, and in pairs; columns that are scaled stay in
    # one pass.
    "tests/forward/test_matmul_matrix.py": (
        "test_on_any_driver[a large rank]",
        "test_on_any_driver[scaled stretches]",
    ),
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
        "test_both_directions[tiled, quantized, two parts-f16]",
        "test_a_copy_in_f16_gives_the_bits_of_its_rows[matrix, f16, two parts]",
        "test_both_directions[tiled, quantized, two parts-f32]",
        "test_both_directions[matrix-f32]",
        "test_both_directions[matrix, one row-f16]",
        "test_both_directions[matrix, stretches-f32]",
        "test_a_copy_in_f16_gives_the_bits_of_its_rows[matrix, one row]",
    ),
    # Bits that don't depend on the place are looked at with plain kernels; values on units stay.
    # The smallest kernels are for software that has units, on which `make test-dawn` runs them.
    "tests/forward/test_attention_matrix.py": (
        "test_against_float64[lengths6-shape6-16]",
        "test_against_float64[lengths4-shape4-64]",
        "test_an_example_gives_the_same_bits_wherever_it_lies_and_whatever_the_block",
        "test_against_float64[lengths0-shape0-128]",
        "test_on_any_driver",
    ),
    # A llama in f32; Gemma's steps in f16 by tests of precision.
    "tests/forward/test_matmul_norm.py": ("test_a_step_is_the_same[gemma2-f16]",),
    # Models whose one-row path has the kernels of those that stay.
    "tests/lora/generation/test_generator.py": (
        "test_token_by_token[mistral3]",
        "test_token_by_token_with_trained_rows[gemma2_q8_0-False]",
        "test_token_by_token_under_dora[False]",
        "test_without_an_adapter_on_a_cpu[gemma2_q8_0]",
        "test_without_an_adapter_on_a_cpu[qwen3]",
        "test_token_by_token[gemma2_q8_0]",
        "test_token_by_token[qwen3]",
        "test_token_by_token[llama_odd]",
        "test_token_by_token[llama_bias]",
        "test_token_by_token[llama_head_dim]",
    ),
    # Plain tiles have the same powers; the kernels' own tests have them on units.
    "tests/lora/training/test_range.py": (
        "test_loss_and_gradients[gemma3 stream]",
        "test_loss_and_gradients[llama queries]",
        "test_loss_and_gradients[gemma3 up]",
        "test_loss_and_gradients[llama bias]",
        "test_loss_and_gradients[llama norms]",
        "test_loss_and_gradients[gemma3 outputs]",
        "test_eight_steps[tiled-gemma3 stream]",
        "test_loss_and_gradients[llama up, matrix]",
        "test_loss_and_gradients[qwen3 all]",
        "test_without_powers_f16_does_not_hold_it[tiled-llama up]",
    ),
    "tests/lora/training/test_precision.py": (
        "test_losses_and_gradients[gemma3-tiled]",
        "test_losses_and_gradients[llama_odd-wide]",
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
        "[True-DeltaSizes(key_heads=1, value_heads=4, head_size=64)-(0, 5, 150, 214, 300)]",
        "[False-DeltaSizes(key_heads=4, value_heads=12, head_size=48)-(0, 1, 130)]",
        "[False-DeltaSizes(key_heads=1, value_heads=4, head_size=64)-(0, 5, 150, 214, 300)]",
        "[True-DeltaSizes(key_heads=4, value_heads=12, head_size=48)-(0, 1, 130)]",
    ),
    # Checkpoints under two seeds have these files beside them.
    "tests/test_order.py": (
        "test_files_are_the_same_under_some_seeds[five]",
        "test_files_are_the_same_under_some_seeds[two]",
    ),
    # Heads of the other size stay on each kind of device.
    "tests/backward/test_gated_delta.py": (
        "[gpu-DeltaSizes(key_heads=4, value_heads=4, head_size=20)]",
        "[cpu-DeltaSizes(key_heads=4, value_heads=12, head_size=8)]",
    ),
    # Of every option, size and number of rows another case stays.
    "tests/backward/test_lora_matrix.py": (
        "test_against_float64[0/65x36 to 0-16, rank 8 in 2, copied]",
        "test_against_float64[0/65x36 to 0-16, rank 8 in 2]",
        "test_against_float64[0/65x36 to 0-16, rank 8 in 2, dropout 0.3]",
        "test_against_float64[3/7x36 to 0-100, rank 16 in 4]",
        "test_against_float64[40/65x260 to 8-40 100-164, rank 16 in 2, copied]",
        "test_against_float64[40/65x260 to 8-40 100-164, rank 16 in 2]",
        "test_against_float64[40/65x260 to 8-40 100-164, rank 16 in 2, DoRA]",
        "test_against_float64[64/65x576 to 0-64 64-128, rank 8 in 4]",
        "test_against_float64[35/37x2052 to 0-1032 1032-1044, rank 12 in 3, dropout 0.25]",
        "test_against_float64[35/37x2052 to 0-1032 1032-1044, rank 12 in 4]",
        "test_large_tiles_of_long_stretches[199/200x260 to 0-132 132-200, rank 8 in 1]",
        "test_large_tiles_of_long_stretches[270/300x200 to 0-136 136-280, rank 8 in 2, copied]",
        "test_many_rows_of_a_workgroup[200]",
        "masks_are_those_of_plain_kernels[40/65x260 to 8-40 100-164, rank 16 in 2, dropout 0.1]",
        "test_rows_of_f32_have_any_size[False]",
        "test_against_float64[0/65x36 to 0-16, rank 8 in 2, DoRA]",
        "test_against_float64[40/65x260 to 8-40 100-164, rank 16 in 2, dropout 0.1]",
        "test_against_float64[40/65x36 to 8-40 40-104, rank 8 in 2, DoRA, copied]",
        "test_against_float64[1/1x4 to 0-4, rank 4 in 1, copied]",
    ),
    # The loss's own and whole rows stay.
    "tests/backward/test_matmul_blocks.py": (
        "test_on_any_driver[parts]",
    ),
    # One row stays, and products without dropout in parts and stretches.
    "tests/backward/test_matmul_dropout.py": (
        "test_on_any_driver[a large rank]",
        "test_on_any_driver[stretches]",
        "test_on_any_driver[two parts]",
    ),
    # Of f16's tiles every fourth stays; all compute in f32.
    "tests/forward/plans/test_matmul_tiles.py": (
        "test_tiles_of_f16[tile12-True-1]",
        "test_tiles_of_f16[tile10-False-1]",
        "test_tiles_of_f16[tile8-False-1]",
        "test_tiles_of_f16[tile6-False-1]",
        "test_tiles_of_f16[tile4-False-1]",
        "test_both_directions[tile13-True-1]",
        "test_tiles_of_f16[tile1-False-1]",
        "test_tiles_of_f16[tile5-False-1]",
        "test_tiles_of_f16[tile9-False-1]",
    ),
    # Heads of 32, 64 and 256 stay, and pieces of each kind; the smallest kernel as above.
    "tests/forward/test_attention_prompt.py": (
        "test_against_float64[heads5-pieces5-64]",
        "test_against_float64[heads3-pieces3-64]",
        "test_against_float64[heads2-pieces2-32]",
        "test_against_float64[heads4-pieces4-32]",
        "test_on_any_driver",
    ),
    # The other half.
    "tests/forward/test_decode_weights.py": (
        "test_the_same_to_the_last_bit[1]",
    ),
    # Each rank and each type stays once.
    "tests/forward/test_dora.py": (
        "test_matrices_that_are_alike_share_a_dispatch[5-Q6_K]",
        "test_matrices_that_are_alike_share_a_dispatch[5-F16]",
        "test_matrices_that_are_alike_share_a_dispatch[8-Q4_1]",
    ),
    # The kernels' own tests have these; of each kernel another check stays.
    "tests/lora/checks/test_on_units.py": (
        "[attention_matrix_backward 67, 2/2 heads of 96]",
        "[lora_matrix 37x260 rank 8]",
        "[attention_matrix 67, 2/2 heads of 96]",
        "[attention_matrix 67, 2/1 heads of 128]",
        "[attention_matrix_backward 67, 2/1 heads of 128]",
        "[attention_matrix_prompt 77, 3 heads of 128]",
        "[lora_matrix rows that are scaled, 37x260 rank 8]",
        "[lora_backward_matrix rows that are scaled, 37x260 rank 8]",
        "[lora_matrix dropout, 37x260 rank 8]",
        "[lora_backward_matrix 37x260 rank 8]",
    ),
    # Other models in f32; f16's tiles by tests of precision.
    "tests/lora/training/test_default_limits.py": (
        "test_a_step_within_the_default_limits[gemma3-False-f16]",
    ),
    # Default limits by test_default_limits.py.
    "tests/lora/training/test_session.py": (
        "test_the_whole_step_at_webgpus_default_limits",
    ),
    # A CPU's text stays, and a GPU's steps.
    "tests/lora/training/test_sizes_per_layer.py": (
        "test_text[gpu]",
    ),
    # A kill at each kind of moment stays.
    "tests/lora/training/test_retries.py": (
        "test_a_kill_in_the_middle_of_a_retry[4-1-saved1]",
        "test_a_kill_in_the_middle_of_a_retry[8-2-saved4]",
        "test_a_kill_in_the_middle_of_a_retry[9-0-saved5]",
    ),
    # The retry of several steps stays.
    "tests/lora/training/test_device_loss.py": (
        "test_retry_goes_on_byte_for_byte[steps0]",
        "test_retry_goes_on_byte_for_byte[steps1]",
    ),
    # That of f16 stays.
    "tests/lora/training/test_non_finite.py": (
        "test_three_in_a_row_end_the_run_with_what_was_good[f32]",
    ),
    # The first check of each kernel stays, on each kind of device: kernels' own tests have more.
    "tests/lora/commands/test_devices.py": (
        "test_every_kernel_has_a_check_and_passes_it[all]",
    ),
    # Windows, splits and tiles of each kind stay, heads of 128 in f32, and those of 512.
    "tests/forward/test_attention.py": (
        "test_attention[lengths3-shape3-tile3]",
        "test_attention[lengths11-shape11-tile11]",
        "test_f16_tensors[lengths3-shape3-tile3]",
    ),
    # One row, rows not in use, long contractions, large ranks and several members stay on a GPU; of
    # f16 each side, by CPUs' blocks or by GPUs'.
    "tests/backward/test_lora.py": (
        "test_lora[7/7x36 to 0-36 36-48 48-60, rank 8 in 4-False]",
        "test_lora[64/65x576 to 0-64 64-128, rank 8 in 4-False]",
        "test_lora_of_halves[7/7x36 to 0-36 36-48 48-60, rank 8 in 4-f16-f16-True]",
        "test_lora_of_halves[7/7x36 to 0-36 36-48 48-60, rank 8 in 4-f32-f16-False]",
        "test_gradients_divided_in_other_ways[16-2-8-4-sides0]",
        "test_every_block_gives_the_same_bits",
        "test_lora[40/65x260 to 8-40 100-164, rank 16 in 2-False]",
        "test_lora[35/37x2052 to 0-1032 1032-1044, rank 8 in 4-True]",
        "test_two_runs_add_up_and_the_same_again_bit_for_bit[CPU's blocks]",
        "test_a_row_does_not_depend_on_the_number_of_rows[CPU's blocks]",
    ),
    # Layers with the other two mixers stay.
    "tests/backward/test_before.py": (
        "test_a_layer_whose_sources_others_overwrote[delta net]",
    ),
    # Which parts there are is no matter of the body: the other one stays.
    "tests/forward/test_matmul.py": (
        "test_split_by_the_largest_binding[wide]",
        "test_mixed_types_in_a_stack[wide]",
    ),
    # Each size stays with some of what a norm may have, the small ones with all.
    "tests/forward/test_rmsnorm.py": (
        "test_z_beside_the_norm[70-64-576-48-plain]",
        "test_z_beside_the_norm[70-64-576-48-f16]",
        "test_z_beside_the_norm[70-64-576-48-stretches]",
        "test_z_beside_the_norm[3-2-2052-20-plain]",
        "test_z_beside_the_norm[3-2-2052-20-residual]",
    ),
    # Heads of the other sizes stay on each kind of device, as with the gradient.
    "tests/forward/test_gated_delta.py": (
        "test_gated_delta[gpu-DeltaSizes(key_heads=4, value_heads=4, head_size=20)]",
        "test_gated_delta[cpu-DeltaSizes(key_heads=4, value_heads=12, head_size=8)]",
    ),
}  # fmt: skip
