"""Pure functions of tensors, one topic a file; import them from their topic.

- `moments`: centring, standard deviation and root mean square of a group, safe in float64
- `max_at_k`: unbiased policy-gradient weights of E[max of k]
- `tail`: Gaussian-tail constants, tail statistics, the plug-in (direct) weights, extrapolated best-of-n
- `jackknife`: prefix weights that cancel the leading bias of the plug-in
- `best_of_n`: unbiased E[max of n] from M samples
- `statistics`: means, paired differences and their standard errors over prompts
- `losses`: clipped policy loss, token weights, importance correction
- `log_probs`: log-probabilities of sampled tokens
- `kl`: estimates of the divergence to a reference
"""
