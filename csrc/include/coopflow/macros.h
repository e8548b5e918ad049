// Marks shared by every layer-1 header: where a function may run, and under which name it is built.
#pragma once

// COOPFLOW_HD marks mathematics that serves both back ends. It is always inlined: the CPU loops are
// compiled once per instruction set, and an out-of-line copy made for one could otherwise be picked
// by the linker for another.
#if defined(__CUDACC__)
#define COOPFLOW_HD __host__ __device__ __forceinline__
#else
#define COOPFLOW_HD inline __attribute__((always_inline))
#endif

// True only while device code is being compiled: selects approximate hardware instructions.
#if defined(__CUDA_ARCH__)
#define COOPFLOW_DEVICE_CODE 1
#else
#define COOPFLOW_DEVICE_CODE 0
#endif

// True while kernels are compiled to run on a CPU in a device's place (tests/cuda_emulation).
#if !defined(COOPFLOW_EMULATED_DEVICE)
#define COOPFLOW_EMULATED_DEVICE 0
#endif

// Asks for full unrolling, so that small arrays stay in registers.
#if defined(__CUDA_ARCH__)
#define COOPFLOW_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)  // host pass of nvcc: nothing in it is run
#define COOPFLOW_UNROLL
#else
#define COOPFLOW_UNROLL _Pragma("GCC unroll 32")
#endif

// Asks for four turns at a time, in loops whose length is not known.
#if defined(__CUDA_ARCH__)
#define COOPFLOW_UNROLL_4 _Pragma("unroll 4")
#else
#define COOPFLOW_UNROLL_4
#endif

// Asks for none, in loops that a kernel seldom enters.
#if defined(__CUDA_ARCH__)
#define COOPFLOW_NO_UNROLL _Pragma("unroll 1")
#else
#define COOPFLOW_NO_UNROLL
#endif

// Before a loop over chains that move side by side: they do not depend on one another, so that a
// CPU moves them in one vector. A thread of a GPU has one.
#if defined(__CUDACC__)
#define COOPFLOW_LANES COOPFLOW_UNROLL
#else
#define COOPFLOW_LANES _Pragma("GCC ivdep") _Pragma("GCC unroll 1")
#endif

// Name of the instruction set a CPU loop file is being compiled for.
#if !defined(COOPFLOW_ISA)
#define COOPFLOW_ISA baseline
#endif
