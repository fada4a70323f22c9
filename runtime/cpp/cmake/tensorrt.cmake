# Finds CUDA and the library that DERAINER_FLAVOR names, unless DERAINER_TENSORRT is OFF. Makes the target
# derainer_tensorrt, the backend, which is without them the file that says so; `tensorrt_missing` says what is not there.
#
# The SDK is looked for where TENSORRT_ROOT or TENSORRT_RTX_ROOT says, where the vendor's CMake package is, and in the
# system's folders. TENSORRT_INCLUDE_DIR and TENSORRT_LIBRARY, or those of TENSORRT_RTX, may be given instead, since the
# packages on PyPI have libraries without headers, and without the names that a linker looks for.

if(DERAINER_FLAVOR STREQUAL "tensorrt")
  set(title "TensorRT")
  set(vendor TensorRT-Enterprise)
  set(prefix TENSORRT)
  set(name nvinfer)
elseif(DERAINER_FLAVOR STREQUAL "rtx")
  set(title "TensorRT for RTX")
  set(vendor TensorRT-RTX)
  set(prefix TENSORRT_RTX)
  set(name tensorrt_rtx)
else()
  message(FATAL_ERROR "DERAINER_FLAVOR: expected tensorrt or rtx, found ${DERAINER_FLAVOR}")
endif()

set(tensorrt_missing "")
if(NOT DERAINER_TENSORRT)
  set(tensorrt_missing "\n  ${title}: DERAINER_TENSORRT is OFF")
else()
  find_package(CUDAToolkit QUIET)
  find_package(${vendor} CONFIG QUIET HINTS "${${prefix}_ROOT}")
  set(hints ${${prefix}_ROOT})
  if(${vendor}_FOUND)
    list(APPEND hints ${${vendor}_DIR}/../../.. ${${vendor}_DIR}/../..)
  endif()
  find_path(${prefix}_INCLUDE_DIR NvInfer.h HINTS ${hints} PATH_SUFFIXES include)
  find_library(${prefix}_LIBRARY ${name} HINTS ${hints} PATH_SUFFIXES lib lib64)
  if(NOT CUDAToolkit_FOUND)
    string(APPEND tensorrt_missing "\n  CUDA's headers and runtime: install the toolkit, or set CUDAToolkit_ROOT")
  endif()
  if(NOT ${prefix}_INCLUDE_DIR)
    string(APPEND tensorrt_missing
           "\n  NvInfer.h of ${title}: install its SDK and set ${prefix}_ROOT, or ${prefix}_INCLUDE_DIR")
  endif()
  if(NOT ${prefix}_LIBRARY)
    string(APPEND tensorrt_missing
           "\n  lib${name}.so: install the SDK of ${title} and set ${prefix}_ROOT, or ${prefix}_LIBRARY")
  endif()
endif()

if(tensorrt_missing)
  add_library(derainer_tensorrt OBJECT no_tensorrt.cpp)
else()
  message(STATUS "${title}: ${${prefix}_INCLUDE_DIR}, ${${prefix}_LIBRARY}; CUDA ${CUDAToolkit_VERSION}")
  add_library(derainer_tensorrt OBJECT trt.cpp trt_${DERAINER_FLAVOR}.cpp)
  target_include_directories(derainer_tensorrt SYSTEM PUBLIC ${${prefix}_INCLUDE_DIR})
  target_link_libraries(derainer_tensorrt PUBLIC ${${prefix}_LIBRARY} CUDA::cudart)
endif()
target_link_libraries(derainer_tensorrt PUBLIC derainer_core)
