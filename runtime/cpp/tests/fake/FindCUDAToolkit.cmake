# CUDA's stand-in, for find_package where this folder is on CMAKE_MODULE_PATH: it is in the same library as TensorRT's.
set(CUDAToolkit_FOUND ON)
set(CUDAToolkit_VERSION 0)
if(NOT TARGET CUDA::cudart)
  add_library(CUDA::cudart INTERFACE IMPORTED)
endif()
