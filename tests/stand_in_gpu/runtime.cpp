// The functions of the CUDA runtime and driver that torch calls, for a device whose memory is the
// host's: allocation, copies, streams, events, and captures, which end in the number of a graph.
// Preloaded, it takes the place of both libraries. What runs on the device is device.py's; a kernel
// of torch's own that is launched all the same is counted and does nothing.
//
// What a driver refuses while a stream is captured is refused: waiting for the device, copies that
// are waited for. The capture is then lost.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace {

using CaptureId = unsigned long long;

struct Stream {
  CaptureId capture = 0;
};

struct Event {
  CaptureId capture = 0;
};

using Lock = std::lock_guard<std::recursive_mutex>;

std::recursive_mutex everything;
std::map<const char*, size_t> device_blocks, host_blocks;
std::set<Stream*> streams;
Stream null_stream;
CaptureId last_capture = 0;
std::map<CaptureId, bool> is_lost;  // of the captures that are underway
void (*replay)(CaptureId) = nullptr;
long launches = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

// Small numbers name the default streams.
Stream* of(cudaStream_t stream) {
  const auto number = reinterpret_cast<size_t>(stream);
  return number <= 2 ? &null_stream : reinterpret_cast<Stream*>(stream);
}

cudaError_t failed(cudaError_t error) {
  last_error = error;
  return error;
}

// What is not allowed in a capture costs the capture.
cudaError_t refused(CaptureId capture) {
  for (auto& [id, lost] : is_lost) lost |= capture == 0 || id == capture;
  return failed(cudaErrorStreamCaptureUnsupported);
}

cudaError_t refused_in_a_capture(CaptureId capture) {
  return capture != 0 && is_lost.count(capture) ? refused(capture) : cudaSuccess;
}

cudaError_t allocate(void** pointer, size_t bytes, std::map<const char*, size_t>& blocks) {
  constexpr size_t kAlignment = 512;
  const Lock lock(everything);
  *pointer = std::aligned_alloc(kAlignment, (bytes / kAlignment + 1) * kAlignment);
  if (*pointer == nullptr) return failed(cudaErrorMemoryAllocation);
  std::memset(*pointer, 0x7f, bytes);  // large numbers, and true
  blocks[static_cast<const char*>(*pointer)] = bytes;
  return cudaSuccess;
}

cudaError_t release(void* pointer, std::map<const char*, size_t>& blocks) {
  const Lock lock(everything);
  blocks.erase(static_cast<const char*>(pointer));
  std::free(pointer);
  return cudaSuccess;
}

bool lies_in(const std::map<const char*, size_t>& blocks, const void* pointer) {
  const auto* address = static_cast<const char*>(pointer);
  auto next = blocks.upper_bound(address);
  if (next == blocks.begin()) return false;
  --next;
  return address < next->first + next->second;
}

cudaError_t launched() {
  ++launches;
  std::fprintf(stderr, "stand-in GPU: a kernel was launched that device.py does not know\n");
  return cudaSuccess;
}

CUresult succeeds() { return CUDA_SUCCESS; }

}  // namespace

extern "C" {

// --- for device.py -------------------------------------------------------------------------------

void stand_in_on_replay(void (*function)(CaptureId)) { replay = function; }

CaptureId stand_in_capture_of(void* stream) {
  const Lock lock(everything);
  return of(static_cast<cudaStream_t>(stream))->capture;
}

long stand_in_launches() { return launches; }

// --- the device ----------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int) { return cudaSuccess; }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "stand-in GPU");
  properties->major = 9;
  properties->totalGlobalMem = size_t{16} << 30;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = 227 << 10;
  properties->sharedMemPerMultiprocessor = 228 << 10;
  properties->regsPerBlock = 65536;
  for (int i = 0; i < 3; ++i) {
    properties->maxThreadsDim[i] = i == 2 ? 64 : 1024;
    properties->maxGridSize[i] = i == 0 ? 2147483647 : 65535;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = 132;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 << 10;
      break;
    default:
      *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int) {
  std::snprintf(id, size, "0000:00:00.0");
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  const Lock lock(everything);
  return is_lost.empty() ? cudaSuccess : refused(0);
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t) { return "error of the stand-in GPU"; }

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorStreamCaptureUnsupported) {
    return "operation not permitted when stream is capturing";
  }
  if (error == cudaErrorStreamCaptureInvalidated) {
    return "operation failed due to a previous error during capture";
  }
  return error == cudaErrorMemoryAllocation ? "out of memory" : "error of the stand-in GPU";
}

// --- memory --------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  return allocate(pointer, bytes, device_blocks);
}

cudaError_t cudaFree(void* pointer) { return release(pointer, device_blocks); }

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  return allocate(pointer, bytes, host_blocks);
}

cudaError_t cudaFreeHost(void* pointer) { return release(pointer, host_blocks); }

cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }

cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const Lock lock(everything);
  *attributes = {};
  if (lies_in(device_blocks, pointer)) {
    attributes->type = cudaMemoryTypeDevice;
  } else if (lies_in(host_blocks, pointer)) {
    attributes->type = cudaMemoryTypeHost;
    attributes->hostPointer = const_cast<void*>(pointer);
  } else {
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = cudaInvalidDeviceId;
    return cudaSuccess;
  }
  attributes->devicePointer = const_cast<void*>(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = size_t{16} << 30;
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  const Lock lock(everything);
  if (!is_lost.empty()) return refused(0);
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

// The copies of tensors are device.py's.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  if (of(stream)->capture != 0) return launched();
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (of(stream)->capture != 0) return launched();
  std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

// --- streams and events --------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  const Lock lock(everything);
  auto* made = new Stream;
  streams.insert(made);
  *stream = reinterpret_cast<cudaStream_t>(made);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Lock lock(everything);
  streams.erase(of(stream));
  delete of(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const Lock lock(everything);
  return refused_in_a_capture(of(stream)->capture);
}

cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }

// A stream that waits for what is captured is captured too.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const Lock lock(everything);
  const CaptureId capture = reinterpret_cast<Event*>(event)->capture;
  if (is_lost.count(capture)) of(stream)->capture = capture;
  return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data,
                                  unsigned) {
  callback(stream, cudaSuccess, data);
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  function(data);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  const Lock lock(everything);
  reinterpret_cast<Event*>(event)->capture = of(stream)->capture;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const Lock lock(everything);
  return refused_in_a_capture(reinterpret_cast<Event*>(event)->capture);
}

cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaEventSynchronize(event); }

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}

// --- captures and graphs -------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  const Lock lock(everything);
  if (of(stream) == &null_stream || of(stream)->capture != 0) return failed(cudaErrorIllegalState);
  of(stream)->capture = ++last_capture;
  is_lost[last_capture] = false;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const Lock lock(everything);
  const CaptureId capture = of(stream)->capture;
  if (capture == 0) return failed(cudaErrorIllegalState);
  for (Stream* other : streams) {
    if (other->capture == capture) other->capture = 0;
  }
  const bool lost = is_lost[capture];
  is_lost.erase(capture);
  *graph = lost ? nullptr : reinterpret_cast<cudaGraph_t>(capture);
  return lost ? failed(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const Lock lock(everything);
  const CaptureId capture = of(stream)->capture;
  *status = capture == 0       ? cudaStreamCaptureStatusNone
            : is_lost[capture] ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* n_nodes) {
  const CaptureId capture = stand_in_capture_of(stream);
  if (id != nullptr) *id = capture;
  if (graph != nullptr) *graph = reinterpret_cast<cudaGraph_t>(capture);
  if (nodes != nullptr) *nodes = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (n_nodes != nullptr) *n_nodes = 0;
  return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                          unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(executable, graph, flags);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  replay(reinterpret_cast<CaptureId>(graph));
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* count) {
  *count = 1;  // none is a mistake that torch warns of
  return cudaSuccess;
}

// --- kernels -------------------------------------------------------------------------------------

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int,
                                                                   size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return launched();
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
  return launched();
}

cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return launched();
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

// --- the driver; see driver.cpp ------------------------------------------------------------------

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  if (flags != nullptr) *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool asks_for_context = std::strcmp(name, "cuDevicePrimaryCtxGetState") == 0;
  *function = asks_for_context ? reinterpret_cast<void*>(&cuDevicePrimaryCtxGetState)
                               : reinterpret_cast<void*>(&succeeds);
  if (result != nullptr) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // extern "C"
