"""Pure functions of tensors, one topic a file; import them from their topic.

- `moments`: centring, standard deviation and root mean square of a group, safe in float64
- `leave_one_out`, `ranks`: sums over the others, mid-ranks, win rates
- `max_at_k`, `off_policy_max_at_k`: unbiased policy-gradient weights of E[max of k], on and off policy
- `log_survival`: weights of the log of the probability to exceed each threshold
- `tail`: Gaussian-tail constants, tail statistics, the plug-in (direct) weights, extrapolated best-of-n
- `gpd_tail`, `tail_models`: other tails, and the choice between them
- `jackknife`: prefix weights that cancel the leading bias of the plug-in
- `normal_tail`: exact expectations over the tail of a normal sample
- `tail_calibration`, `optimal_tail`: coefficients that make the tail weights exactly unbiased, and least noisy
- `binary`, `entropic`: weights for 0/1 rewards, exponentially tilted weights
- `tail_shape`, `tail_prediction`, `tail_checks`: is a sample's upper tail what the estimators assume
- `best_of_n`: unbiased E[max of n] from M samples
- `statistics`: means, paired differences and their standard errors over prompts
- `losses`: clipped policy loss, token weights, importance correction
- `log_probs`: log-probabilities of sampled tokens
- `kl`: estimates of the divergence to a reference
"""
