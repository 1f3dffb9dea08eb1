// The torch operator library dft_kernels, as far as it is defined in C++.
#include <ATen/Version.h>
#include <torch/library.h>

#include <string>
#include <vector>

// The instruction sets of this processor, of those that the kernels can use.
static std::vector<std::string> instruction_sets() {
  std::vector<std::string> sets{at::get_cpu_capability()};
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) sets.emplace_back("avx2");
  if (__builtin_cpu_supports("fma")) sets.emplace_back("fma");
  if (__builtin_cpu_supports("avx512f")) sets.emplace_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) sets.emplace_back("avx512bw");
  if (__builtin_cpu_supports("avx512vnni")) sets.emplace_back("avx512vnni");
  if (__builtin_cpu_supports("avx512bf16")) sets.emplace_back("avx512bf16");
#endif
  return sets;
}

TORCH_LIBRARY_FRAGMENT(dft_kernels, m) {
  // First ATen's own dispatch level (ATEN_CPU_CAPABILITY can lower it), then what the processor has.
  m.def("instruction_sets() -> str[]", &instruction_sets);
}
