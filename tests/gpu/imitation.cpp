// A CUDA device that is none: its memory is the machine's, and the CPU computes what is asked of it.
//
// Tensors are of device "cuda" for whoever looks. An operation on tensors of two devices is refused, as on a
// GPU, and so is the CPU's look into such a tensor. Torch's own build for CPUs is needed, which has no kernel
// for CUDA: all of them are torch's fallback to the CPU, but for those that make, copy and view tensors.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <cstring>
#include <set>

using namespace at;

struct Memory final : Allocator {
  DataPtr allocate(size_t size) override {
    void* data = c10::alloc_cpu(size);
    return {data, data, &release, Device(kCUDA, 0)};
  }
  static void release(void* data) { c10::free_cpu(data); }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t size) const override { std::memcpy(to, from, size); }
};
static Memory memory;

// One device with one stream, on which nothing ever waits.
struct Guard final : public c10::impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = kCUDA;
  Guard() = default;
  explicit Guard(DeviceType) {}
  DeviceType type() const override { return kCUDA; }
  Device exchangeDevice(Device) const override { return Device(kCUDA, 0); }
  Device getDevice() const override { return Device(kCUDA, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, Device(kCUDA, 0)); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// Torch finds it by this name.
struct CUDAHooks final : public CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  Allocator* getCUDADeviceAllocator() const override { return &memory; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  Device getDeviceFromPtr(void*) const override { return Device(kCUDA, 0); }
  bool isPinnedPtr(const void*) const override { return false; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

Tensor make(IntArrayRef sizes, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>,
             std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor make_strided(IntArrayRef sizes, IntArrayRef strides, std::optional<ScalarType> dtype,
                     std::optional<Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(sizes, strides, &memory, KEYS, c10::dtype_or_default(dtype));
}

// A tensor of the CPU with the same bytes.
Tensor on_cpu(const Tensor& tensor) {
  if (tensor.device().is_cpu()) return tensor;
  const auto& storage = tensor.storage();
  int64_t numbers = storage.nbytes() / tensor.element_size();
  auto flat = at::from_blob(storage.mutable_data(), {numbers}, tensor.options().device(kCPU));
  return flat.as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
}

Tensor& copy_into(Tensor& to, const Tensor& from, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

const Tensor& grow(const Tensor& tensor, IntArrayRef sizes, std::optional<MemoryFormat>) {
  auto* inner = tensor.unsafeGetTensorImpl();
  size_t needed = (c10::multiply_integers(sizes) + inner->storage_offset()) * tensor.element_size();
  auto* storage = inner->storage().unsafeGetStorageImpl();
  if (needed > storage->nbytes()) {
    auto data = memory.allocate(needed);
    std::memcpy(data.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(data));
    storage->set_nbytes(needed);
  }
  inner->set_sizes_contiguous(sizes);
  return tensor;
}

// What an operation that changes its argument has written; the argument may be a view with strides.
Tensor copy_back(const Tensor& from, const Tensor& to) {
  if (from.sizes() != to.sizes()) to.resize_(from.sizes());
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

Scalar number(const Tensor& tensor) { return on_cpu(tensor).item(); }

Tensor& set_storage(Tensor& tensor, Storage storage, int64_t offset, IntArrayRef sizes, IntArrayRef strides) {
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return tensor;
}

Tensor& set_tensor(Tensor& tensor, const Tensor& source) {
  return set_storage(tensor, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

int64_t plain_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                        std::optional<double>, bool) {
  return 0;
}

// A GPU takes indices that lie on the CPU, and nothing else.
static const std::set<std::string> MIXED = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"};

void on_one_device(const c10::OperatorHandle& operation, const torch::jit::Stack& stack) {
  const auto& name = operation.schema().name();
  if (MIXED.count(name)) return;
  std::optional<Device> first;
  auto look = [&](const Tensor& tensor) {
    if (!tensor.defined() || tensor.dim() == 0) return;
    if (!first) first = tensor.device();
    TORCH_CHECK(*first == tensor.device(), "Expected all tensors to be on the same device, but found at least ",
                "two devices, ", *first, " and ", tensor.device(), "! (", name, ")");
  };
  for (const auto& value : torch::jit::last(stack, operation.schema().arguments().size())) {
    if (value.isTensor()) look(value.toTensor());
    if (value.isTensorList())
      for (const auto& tensor : value.toTensorVector()) look(tensor);
  }
}

void compute(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  on_one_device(operation, *stack);
  at::native::cpu_fallback(operation, stack);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &make);
  m.impl("empty_strided", &make_strided);
  m.impl("copy_", &copy_into);
  m.impl("_copy_from_and_resize", &copy_back);
  m.impl("resize_", &grow);
  m.impl("_local_scalar_dense", &number);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("unfold", at::native::unfold);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("_fused_sdp_choice", &plain_attention);
}

static int begun = [] {
  c10::SetAllocator(kCUDA, &memory);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&plain_attention);
  return 0;
}();
