"""One file a quantity: tokens to a target, critical batch, token ratio, frontier, losses at equal budgets."""
