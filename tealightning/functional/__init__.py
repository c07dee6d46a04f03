"""Pure functions of tensors, one topic a file; import them from their topic.

- `moments`: centring, standard deviations, leave-one-out sums, ranks and win rates of a group
- `max_at_k`: unbiased policy-gradient weights of E[max of k], on and off policy, and of the log survival probability
- `tail`: constants of the Gaussian tail, plug-in weights, and the calibration and jackknife that remove their bias
- `tail_models`: other tails (generalised Pareto, empirical), and the choice between them
- `normal_tail`: exact expectations over the tail of a normal sample
- `optimal_tail`: the least noisy of the exactly unbiased tail weights
- `binary`, `entropic`: weights for 0/1 rewards, exponentially tilted weights
- `tail_checks`, `tail_shape`, `tail_prediction`: is a sample's upper tail what the estimators assume
- `best_of_n`: unbiased E[max of n] from M samples, selection by a proxy, comparisons of two policies
- `statistics`: means, paired differences and crossed bootstrap over prompts and seeds
- `diversity`: distinct n-grams and overlap of completions
- `losses`: clipped policy loss, token weights, importance correction, KL estimates
- `log_probs`: log-probabilities of sampled tokens
"""
