"""What `make test` runs in part: two cores are done with it in a quarter of an hour. `make test THOROUGH=1` runs all.

Of a test's cases some stay; what is left out whole is seen elsewhere too, as is said beside it. pytest by itself runs
everything.
"""

import os
from collections import Counter

IN_PART = os.environ.get("DSKERNELS_TEST_IN_PART") == "1"

# Of a test's cases one in so many, the first among them; CPU seconds of all.
ONE_IN = {
    "tests/test_mla_decode_emulated.py::test_against_fp64": 2,  # 27
    "tests/test_mla_decode_rows_emulated.py::test_against_fp64": 2,  # 18
    "tests/test_routing_emulated.py::test_emulated": 2,  # 20
    "tests/parallel/test_handover.py::test_stages_hand_over_what_the_engine_would_post": 2,  # 29
    "tests/model/test_generate.py::test_sampled_text_has_the_models_distribution": 3,  # 14
    "tests/model/test_generate.py::test_greedy_is_the_same_however_it_is_run": 2,  # 17
    "tests/model/test_prefix_sharing.py::test_texts_are_the_same": 2,  # 17
    "tests/model/test_checkpoint_fp8.py::test_the_host_holds_less_than_two_shards": 2,  # 16
    "tests/integrations/test_transformers_graphs.py::test_generation": 2,  # 14; both families, each length with one
    "tests/model/test_transformers_generate.py::test_logits_and_texts": 2,  # 15
    "tests/model/test_transformers.py::test_greedy_generation": 2,  # 14
    "tests/model/test_kernels.py::test_generation": 2,  # 17
    "tests/model/test_train.py::test_low_precision_learns_too": 2,  # 9
    "tests/test_moe_hopper.py::test_against_fp32": 2,  # 14
    "tests/test_compile_model.py::test_kernels_of_steps_compile_without_spills": 2,  # 10
    "tests/test_benchmarks.py::test_every_case_runs_small_and_agrees_with_its_peers": 2,  # 21
}
LEFT_OUT = {
    "tests/model/test_invariance.py::test_a_thousand_prompts_through_sixteen_slots",  # 51; on a GPU by `make test-gpu`
    "tests/test_compile_mla_decode.py::test_it_compiles_as_racecheck_follows_it",  # 16; `make sanitize` compiles it
}


def chosen(items):
    """(those that run, those that do not) of pytest's items."""
    before = Counter()
    run, rest = [], []
    for item in items:
        name = item.nodeid.split("[")[0]
        n = before[name]
        before[name] += 1
        (rest if name in LEFT_OUT or n % ONE_IN.get(name, 1) else run).append(item)
    return run, rest
