import pytest

from analysis import format as fmt


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(256, "256"), (1024, "1K"), (2048.0, "2K"), (16384, "16K"), (2**20, "1M"), (2**31, "2B"), (2**52, "4096T")],
)
def test_tokens_that_are_a_power_of_two_are_written_in_binary_units(tokens, text):
    assert fmt.tokens(tokens) == text


@pytest.mark.parametrize(("tokens", "text"), [(1000, "1.00K"), (1536, "1.54K"), (1024.5, "1.02K"), (16000, "16.0K")])
def test_tokens_of_any_other_number_show_decimals_that_no_binary_number_has(tokens, text):
    assert fmt.tokens(tokens) == text


@pytest.mark.parametrize(("value", "text"), [(0.02, "0.02"), (500, "500"), (1000, "1K"), (50_000, "50K"), (2e6, "2M")])
def test_tick_is_a_round_decimal_number_without_zeros(value, text):
    assert fmt.tick(value) == text


@pytest.mark.parametrize(
    ("words", "text"), [([], ""), (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")]
)
def test_listed_joins_words_as_people_do(words, text):
    assert fmt.listed(words) == text


def test_first_counts_the_words_that_it_leaves_out():
    assert fmt.first(["a", "b", "c"], 3) == ["a", "b", "c"]
    assert fmt.first(["a", "b", "c", "d"], 3) == ["a", "b", "2 more"]


def test_a_small_number_below_zero_is_no_zero_with_a_sign():
    assert [fmt.column_writer("slope")(value) for value in (-0.001, -0.01)] == ["0.00", "-0.01"]


def test_verdicts_of_the_analysis_are_written_without_identifiers():
    assert fmt.verdict("edge_of_grid") == "best learning rate at the edge of those tried"
    assert fmt.optimizer_name("muon, momentum=0.95") == "Muon, momentum=0.95"
    assert (fmt.count(1, "run"), fmt.count(2, "run")) == ("1 run", "2 runs")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (780, "780"),
        (780.4, "780"),
        (0.5, "0.500"),
        (1_870, "1.87K"),
        (999.7, "1.00K"),
        (1.048e6, "1.05M"),
        (2.1e9, "2.10B"),
    ],
)
def test_tokens_have_three_digits_and_decimal_k(value, text):
    assert fmt.tokens(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.0123, "0.0123"),
        (-0.05, "-0.0500"),
        (9.996, "10.0"),
        (12345.0, "12345"),
        (1.5e-5, "1.50e-5"),
        (2.5e10, "2.50e10"),
    ],
)
def test_number_has_three_significant_digits(value, text):
    assert fmt.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(38.14, "38.1 s"), (0.5, "0.500 s"), (750, "12.5 min"), (25_920, "7.20 h")]
)
def test_seconds_are_written_in_the_largest_unit_of_at_least_two(value, text):
    assert fmt.seconds(value) == text


def test_flops_use_si_suffixes():
    assert (fmt.flops(1.2e12), fmt.flops(5e9), fmt.tick_flops(5e10)) == ("1.20T", "5.00G", "50G")


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [(640.0, 960.0, "780 [640, 960]"), (640.0, None, "780 [≥ 640]"), (None, 960.0, "780 [≤ 960]"), (None, None, "780")],
)
def test_estimate_shows_the_ends_that_are_known(low, high, text):
    row = {"critical_batch_tokens": 780.0, "critical_batch_tokens_low": low, "critical_batch_tokens_high": high}
    assert fmt.estimate(row, "critical_batch_tokens") == text


def test_estimate_without_a_number_is_a_dash_not_a_zero():
    row = {"slope": None, "slope_low": None, "slope_high": None}
    assert fmt.estimate(row, "slope") == fmt.MISSING


def test_column_writer_follows_the_unit_in_the_name():
    writers = {
        name: fmt.column_writer(name) for name in ("global_batch_tokens", "warmup_tokens", "train_seconds", "peak_lr")
    }
    values = {name: write(16384) for name, write in writers.items()}
    assert values == {
        "global_batch_tokens": "16K",
        "warmup_tokens": "16K",
        "train_seconds": "4.55 h",
        "peak_lr": "1.64e+04",
    }


def test_target_loss_keeps_its_decimals():
    assert (fmt.loss(2.0), fmt.loss(3.15)) == ("2.0", "3.15")


def test_optimizers_are_written_as_their_papers_do_and_unknown_ones_as_they_are():
    names = ("lamb", "lars", "scion", "orscale", "mona", "muon_plus", "sgd", "soap", "my_own")
    written = ("LAMB", "LARS", "Scion", "OrScale", "MONA", "Muon+", "SGD", "SOAP", "my_own")
    assert tuple(map(fmt.optimizer_name, names)) == written


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("share", 0.934, "93%"),
        ("model_error", -0.052, "-5.2%"),
        ("p_value_holm", 0.0412, "0.041"),
        ("batch_ratio", 2.1, "2.10"),
        ("cost_ratio", 1.604, "1.60"),
        ("limit", 200.0, "3.33 min"),
        ("gap_nats", -0.0304, "-0.030"),
    ],
)
def test_columns_of_comparisons_are_written_by_their_names(column, value, text):
    assert fmt.column_writer(column)(value) == text
