// Makes CPU tensors look like tensors on a CUDA device to the ops under test, by defining those few
// functions of torch's C interface that speak of devices. Only this library calls them.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "emulation.h"

namespace {

constexpr int kNoDevice = -1;
int the_tensor_device = 0;
int guarded_device = kNoDevice;
char streams[cuda_emulation::kDevices];
int the_driver_version = 13000;

}  // namespace

namespace cuda_emulation {

int current_device() { return guarded_device; }
void* current_stream() { return guarded_device < 0 ? nullptr : &streams[guarded_device]; }
int tensor_device() { return the_tensor_device; }
void set_tensor_device(int device) { the_tensor_device = device; }
int driver_version() { return the_driver_version; }
void set_driver_version(int version) { the_driver_version = version; }

}  // namespace cuda_emulation

extern "C" {

AOTITorchError aoti_torch_get_device_index(AtenTensorHandle /*tensor*/, int32_t* index) {
  *index = the_tensor_device;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(new int(guarded_device));
  guarded_device = index;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  int* const previous = reinterpret_cast<int*>(guard);
  guarded_device = *previous;
  delete previous;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t index, void** stream) {
  *stream = &streams[index];
  return AOTI_TORCH_SUCCESS;
}
}
