// The CUDA translation unit itself, for the emulator.
#include "device_language.h"
//
#include "cuda/table.cu"
