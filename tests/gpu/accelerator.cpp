// Torch's build for CPUs says that there is no accelerator, and backward passes ask for it: this library stands
// before it (LD_PRELOAD) and answers CUDA.
#include <cstdint>
#include <optional>

namespace c10 {
enum class DeviceType : int8_t {};
}
namespace at::accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) { return c10::DeviceType(1); }
}  // namespace at::accelerator
