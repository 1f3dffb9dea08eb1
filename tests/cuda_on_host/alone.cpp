// The lean kernel of cross-entropy by itself, over rows of two blocks through both orders of threads: exits with 0
// where it finds every log-sum-exp and writes every gradient, else says what went wrong.
// tests/backends/test_lean.py compiles it with faults in the kernel.
#include <cstdio>

#include "cuda/lean.cuh"

using namespace dft;
using namespace dft::cuda;

int main() {
  constexpr int rows = 11, vocab = 4000;
  static float logits[rows][vocab], out[rows][vocab], statistics[kRows][rows], cotangents[kCorrect][rows];
  for (bool reversed : {false, true}) {
    for (int row = 0; row < rows; row++) {
      cotangents[kLse][row] = 1;
      for (int v = 0; v < vocab; v++) logits[row][v] = float(row + v * 37 % 101) / 20, out[row][v] = 0;
    }
    RowArguments a = {};
    a.rows = rows, a.vocab = vocab;
    a.logits = {logits, vocab, Element::f32, true};
    a.out = {out, vocab, Element::f32, true};
    a.finish = {1, 0};
    a.statistics = statistics, a.statistics_stride = rows;
    a.cotangents = cotangents, a.cotangents_stride = rows;
    a.divergence = kDivergences, a.inverse = a.target_inverse = 1;
    a.wanted = a.live = 1 << kLse;
    Plan plan = {2000, 2, 1, 8000, 32, 1, 1, 1, 0, 0, 1, 0, 0, true, true, false, 1 << kTotal};
    on_host::machine().reversed = reversed;
    if (const char* message = launch_lean<None, 32>(a, plan, nullptr)) return std::printf("%s\n", message), 1;
    for (int row = 0; row < rows; row++) {
      double total = 0;
      for (int v = 0; v < vocab; v++) total += std::exp(double(logits[row][v]));
      if (!(std::fabs(statistics[kLse][row] - std::log(total)) < 1e-5)) return std::printf("row %d: lse\n", row), 1;
      for (int v = 0; v < vocab; v++)
        if (!(std::fabs(out[row][v] - std::exp(double(logits[row][v])) / total) < 1e-8))
          return std::printf("row %d, column %d: gradient\n", row, v), 1;
    }
  }
  return 0;
}
