// GPTAQ: GPTQ that knows what its inputs lost against the float model (docs/algorithms.md). It
// solves for the corrected weight; the solver applies LinearProblem::mismatch, this file asks for
// it. Li et al., arXiv 2504.02692, minimise the same error; the residual term is our addition.
#include "algorithms/quantizer.h"

namespace bitmill {

const Quantizer& gptq_quantizer();

namespace {

class Gptaq final : public Quantizer {
 public:
  std::string name() const override { return "gptaq"; }
  bool needs_hessian() const override { return true; }
  bool compares_with_float() const override { return true; }
  void check(const QuantizeSettings& settings) const override { gptq_quantizer().check(settings); }

  std::vector<QuantizeResult> quantize(std::span<const LinearProblem> problems,
                                       const Hessian* hessian, Backend& backend,
                                       const RowPeers& peers) const override {
    return gptq_quantizer().quantize(problems, hessian, backend, peers);
  }
};

}  // namespace

const Quantizer& gptaq_quantizer() {
  static const Gptaq quantizer;
  return quantizer;
}

}  // namespace bitmill
