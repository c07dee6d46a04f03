"""Pure functions of tensors, one topic a file; import them from their topic.

- `moments`: centring, standard deviations, leave-one-out sums, ranks and win rates of a group
- `max_at_k`: unbiased policy-gradient weights of E[max of k], on and off policy, and of the log survival probability
- `tail`: constants of the Gaussian tail; plug-in weights of a Gaussian, generalised Pareto or empirical tail; jackknife
- `normal_tail`: exact expectations over the tail of a normal sample
- `optimal_tail`: tail weights that are exactly unbiased, calibrated or with the least noise
- `binary`, `entropic`: weights for 0/1 rewards, exponentially tilted weights
- `tail_checks`, `tail_shape`: is a sample's upper tail what the estimators assume
- `best_of_n`: unbiased E[max of n] from M samples, selection by a proxy, comparisons of two policies
- `statistics`: means, paired differences and crossed bootstrap over prompts and seeds
- `diversity`: distinct n-grams and overlap of completions
- `losses`: clipped policy loss, token weights, importance correction, KL estimates
- `log_probs`: log-probabilities of sampled tokens

Arguments that mean the same everywhere and are not described again:

- `rewards`: [P, m] float64, finite; m rollouts (M samples of a metric) of each of P prompts
- `valid`: [P, M] bool, False = not a sample; None = all
- `target_n`: N of the objective E[max of N]; `n`, `ns`: budgets, >= 1
- `alpha`: upper-tail level in (0, 1]; the tail is the top `k = ceil(alpha m)`

Weights are [P, m] float64 in the mean convention: `(1/m) sum_i A_i grad log pi(y_i)` estimates the gradient.
"""
