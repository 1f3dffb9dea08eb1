// A translated kernel over its grid. It is compiled when it is first asked for, and kept. The machine of cuda_on_host.h
// is one in all libraries of a process: g++ makes the variables of inline functions unique.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cstdlib>
#include <map>

#include "ptx.h"

namespace ptx {
namespace {

struct Kernel {
  void (*run)(void* const* parameters);
  uint32_t first_dynamic;
};

Kernel load(const std::string& path) {
  const int lock = open((path + ".lock").c_str(), O_CREAT | O_RDWR, 0666);
  flock(lock, LOCK_EX);  // of the processes of one test run the first compiles
  if (access((path + ".so").c_str(), R_OK)) {
    const std::string from = "'" + path + ".cpp'", part = "'" + path + ".part'", to = "'" + path + ".so'";
    const std::string command = PTX_COMPILE " -o " + part + " " + from + " && mv " + part + " " + to;
    if (std::system(command.c_str())) throw std::runtime_error("not compiled: " + command);
  }
  close(lock);
  void* library = dlopen((path + ".so").c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  return {reinterpret_cast<void (*)(void* const*)>(dlsym(library, "kernel")),
          *static_cast<const uint32_t*>(dlsym(library, "first_dynamic"))};
}

}  // namespace

void launch(const std::string& path, const unsigned (&grid)[3], unsigned cluster, unsigned threads,
            size_t dynamic_bytes, void* const* parameters) {
  static std::map<std::string, Kernel> known;
  if (!known.count(path)) known[path] = load(path);
  const Kernel kernel = known[path];
  state().named.assign(16 * cluster, {});
  state().threads.resize(threads * cluster);
  on_host::run_grid(dim3(grid[0], grid[1], grid[2]), cluster, int(threads), kernel.first_dynamic + dynamic_bytes, [=] {
    this_thread() = {};
    kernel.run(parameters);
    if (this_thread().groups.size() > 1 || !this_thread().groups[0].empty())
      throw std::runtime_error("a thread has not waited for its copies");
  });
}

}  // namespace ptx

// The same for Python; what went wrong, or null
extern "C" const char* ptx_launch(const char* path, unsigned x, unsigned y, unsigned z, unsigned threads,
                                  size_t dynamic_bytes, void* const* parameters) {
  return on_host::reported([&] { ptx::launch(path, {x, y, z}, 1, threads, dynamic_bytes, parameters); });
}
