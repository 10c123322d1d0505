import pytest

from analysis import format as fmt


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(256, "256"), (1000, "1000"), (1024, "1K"), (1536, "1.5K"), (16384, "16K"), (2**20, "1M"), (3 * 2**19, "1.5M")],
)
def test_batch_is_written_exactly_with_binary_k(tokens, text):
    assert fmt.batch(tokens) == text


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
        "warmup_tokens": "16.4K",
        "train_seconds": "4.55 h",
        "peak_lr": "1.64e+04",
    }


def test_target_loss_keeps_its_decimals():
    assert (fmt.loss(2.0), fmt.loss(3.15)) == ("2.0", "3.15")
