#include "pipeline/capture.h"

#include <algorithm>

namespace bitmill {
namespace {

// Does any linear of the cut that is quantized ask for it?
template <typename Asks>
bool any_linear(const RunOptions& options, const BlockSpec& block, int cut, Asks&& asks) {
  const std::vector<int>& linears = block.cuts[cut].linears;
  return std::any_of(linears.begin(), linears.end(), [&](int linear) {
    const QuantizeSettings settings = options.settings_for(block.linears[linear].module);
    return !settings.skip && asks(find_quantizer(settings.algorithm));
  });
}

}  // namespace

bool needs_hessian(const RunOptions& options, const BlockSpec& block, int cut) {
  return any_linear(options, block, cut, [](const Quantizer& q) { return q.needs_hessian(); });
}

bool needs_mismatch(const RunOptions& options, const BlockSpec& block, int cut) {
  return any_linear(options, block, cut, [](const Quantizer& q) { return q.compares_with_float(); });
}

void check_finite(Backend& backend, const BlockSpec& block, int cut, TensorView x, const BatchRange& range) {
  const int64_t bad = backend.first_non_finite(x);
  if (bad < 0) return;
  const int64_t token = bad / x.cols(), length = x.rows() / std::max<int64_t>(1, range.samples);
  fail(ExitCode::kInput,
       "{}: its input is not finite in calibration sample {} (token {}, channel {}): the "
       "activations overflow in an earlier layer, or a weight is far out of range",
       block.linears[block.cuts[cut].linears.front()].module, range.first_sample + token / length, token % length,
       bad % x.cols());
}

void note_finite(Backend& backend, const BlockSpec& block, int cut, TensorView x, const BatchRange& range,
                 std::optional<Error>& refused) {
  if (refused) return;
  try {
    check_finite(backend, block, cut, x, range);
  } catch (const Error& error) {
    refused = error;
  }
}

CutCapture::CutCapture(const BlockContext& context, const BlockSpec& block, int cut, bool compares)
    : context_(context),
      block_(block),
      cut_(cut),
      hessian_(block.cuts[cut].in, DType::kF32, context.backend, context.lanes()) {
  if (!compares || !needs_mismatch(context.options, block, cut)) return;
  const CutSpec& spec = block.cuts[cut];
  const int64_t hidden = spec.adds_to_hidden ? block.linears[spec.linears.front()].out : 0;
  mismatch_.emplace(spec.in, hidden, DType::kF32, context.backend, context.lanes());
}

void CutCapture::add(TensorView x, const BatchRange& range) {
  PhaseTimer timer(context_.phases, Phase::kHessian);
  hessian_.add(x, range.samples, range.lane);
  if (!hessian_.finite()) note_finite(context_.backend, block_, cut_, x, range, refused_);
  if (context_.group.size() == 1) context_.group.agree(refused_);  // nobody to wait for
}

void CutCapture::compare(TensorView x, TensorView x_float, const MicroBatch& batch, const MicroBatch& float_batch,
                         const BatchRange& range) {
  PhaseTimer timer(context_.phases, Phase::kHessian);
  const bool residual = block_.cuts[cut_].adds_to_hidden;
  mismatch_->add(x, x_float, residual ? batch.hidden.view() : TensorView(),
                 residual ? float_batch.hidden.view() : TensorView(), range.lane);
}

CutSums CutCapture::merge() {
  context_.meet();
  context_.group.agree(refused_);
  // Alone, the lanes are only added up.
  PhaseTimer timer(context_.phases, context_.group.size() > 1 ? Phase::kExchange : Phase::kHessian);
  CutSums sums{context_.group.merge(hessian_), {}};
  if (mismatch_) sums.mismatch = context_.group.merge(*mismatch_);
  return sums;
}

void run_float_block(const BlockContext& context, const BlockSpec& block, const BlockGraph& graph,
                     const BlockWeights& weights, const BatchRange& range, MicroBatch& batch,
                     std::vector<CutCapture>& captures, bool to_the_end) {
  const int cuts = static_cast<int>(block.cuts.size());
  Tensor scratch;
  for (int cut = 0; cut < cuts; ++cut) {
    TensorView x;
    {
      PhaseTimer timer(context.phases, Phase::kForward);
      x = graph.input(cut, weights, batch, context.backend, scratch);
    }
    if (needs_hessian(context.options, block, cut)) captures[cut].add(x, range);
    if (cut + 1 == cuts && !to_the_end) break;
    PhaseTimer timer(context.phases, Phase::kForward);
    graph.advance(cut, weights, x, batch, context.backend);
  }
}

}  // namespace bitmill
