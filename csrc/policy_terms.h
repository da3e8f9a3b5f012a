// The loss of one token under an RL objective, and its derivatives: `policy_terms` of bupo_kernels/policy_losses.py, term for term,
// for objectives whose terms depend on that token alone. The conventions are those of that file: a bound decides only strictly
// beyond it; log-ratios are clamped, and strictly outside no gradient goes through them; a token whose sampler log-prob is not
// finite does not count.
//
// NaN must come out as NaN, as it does in torch. So fmin and fmax, which drop it, are not used, and a gradient is switched off by a
// product with 0.
#pragma once

#include "row_statistics.h"

namespace bupo {

enum class Ratio { token, none };
enum class Clip { none, ppo, cispo, sapo };
enum class Divergence { none, k1, k2, k3 };

struct Objective {
  Ratio ratio;
  Clip clip;
  Divergence kl;
  bool importance;           // whether to weigh the policy term by min(π_old / π_sampler, importance_cap)
  float floor, top;          // bounds of the ratio: 1 − clip_low and 1 + clip_high
  float ceiling;             // bound of the ratio where the advantage is negative: dual_clip, delta or infinity
  float sapo_pos, sapo_neg;  // temperatures of SAPO's gate where the advantage is positive, and elsewhere
  float kl_coefficient;
  float entropy_coefficient;
  float importance_cap;
};

struct Token {
  float logprob, entropy, advantage;
  float old_logprob;        // the log-prob itself where on-policy
  float reference_logprob;  // read only with a divergence
  float sampler_logprob;    // any finite number without a sampler
};

struct PolicyTerms {
  float loss, d_logprob, d_entropy;
};

BUPO_HD float clamped(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

// |ln ratio| is clamped before exp: e^20 is far outside any clip range and far inside fp32's.
constexpr float max_log_ratio = 20.0f;

BUPO_HD float clamped_log_ratio(float x) { return clamped(x, -max_log_ratio, max_log_ratio); }
BUPO_HD bool inside(float log_ratio) { return fabsf(log_ratio) <= max_log_ratio; }

// Returns the loss and its derivative in ln ratio or, where the ratio is a constant, in the log-prob.
BUPO_HD PolicyTerms policy_term(const Objective& objective, float ratio, float logprob, float advantage) {
  if (objective.ratio == Ratio::none) return {-advantage * logprob, -advantage, 0};
  if (objective.clip == Clip::cispo) {
    const float slope = -(ratio > objective.top ? objective.top : ratio) * advantage;
    return {slope * logprob, slope, 0};
  }
  if (objective.clip == Clip::sapo) {
    const float temperature = advantage > 0 ? objective.sapo_pos : objective.sapo_neg, x = temperature * (ratio - 1);
    const float gate = 1 / (1 + expf(-x)), rest = 1 / (1 + expf(x));  // 1 − gate would round to 0
    return {-4 / temperature * gate * advantage, -4 * gate * rest * ratio * advantage, 0};
  }
  // The minimum of both branches is one clamp of the ratio, to bounds that depend on the advantage's sign.
  const float floor = objective.clip == Clip::ppo ? objective.floor : 0;
  const float top = objective.clip == Clip::ppo ? objective.top : objective.ceiling;
  const bool gain = advantage > 0, harm = advantage < 0;
  const bool decided = (harm && (ratio < floor || ratio > objective.ceiling)) || (gain && ratio > top);
  const float bounded = gain ? (ratio > top ? top : ratio) : clamped(ratio, floor, objective.ceiling);
  const float loss = -bounded * advantage;
  return {loss, decided ? 0 * loss : loss, 0};
}

// Returns one of Schulman's estimators of KL(π ‖ other), from ln other − ln π, and its derivative in ln π.
BUPO_HD PolicyTerms divergence(Divergence estimator, float log_ratio) {
  const float d = clamped_log_ratio(log_ratio);
  float value, slope;
  if (estimator == Divergence::k1) {
    value = -d, slope = 0 * d + 1;
  } else if (estimator == Divergence::k2) {
    value = d * d / 2, slope = -d;
  } else {
    const float excess = expm1f(d);
    value = excess - d, slope = -excess;
  }
  return {value, inside(log_ratio) ? slope : 0 * slope, 0};
}

// Returns the loss of `token` and its derivatives in its log-prob and entropy.
BUPO_HD PolicyTerms policy_terms(const Objective& objective, const Token& token) {
  if (!(fabsf(token.sampler_logprob) <= FLT_MAX)) return {0, 0, 0};
  const float log_ratio = token.logprob - token.old_logprob;
  PolicyTerms terms = policy_term(objective, expf(clamped_log_ratio(log_ratio)), token.logprob, token.advantage);
  if (objective.importance) {
    const float weight = expf(clamped_log_ratio(token.old_logprob - token.sampler_logprob));
    const float capped = weight > objective.importance_cap ? objective.importance_cap : weight;
    terms.loss *= capped, terms.d_logprob *= capped;
  }
  const bool through_ratio = objective.ratio == Ratio::token && objective.clip != Clip::cispo;
  if (through_ratio && !inside(log_ratio)) terms.d_logprob *= 0;
  if (objective.kl != Divergence::none) {
    const PolicyTerms kl = divergence(objective.kl, token.reference_logprob - token.logprob);
    terms.loss += objective.kl_coefficient * kl.loss, terms.d_logprob += objective.kl_coefficient * kl.d_logprob;
  }
  if (objective.entropy_coefficient != 0) terms.loss -= objective.entropy_coefficient * token.entropy;
  terms.d_entropy = -objective.entropy_coefficient;
  return terms;
}

}  // namespace bupo
