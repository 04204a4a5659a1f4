# The tensor-core attention kernels that are compiled: every type of cache at every pair of head
# sizes. Smaller head sizes run on the next larger pair and read no more of the cache for it;
# larger ones, and everything where the list is empty, run on attend_fp32. Each pair of sizes adds
# minutes to a build for all architectures.
set(DIFFKV_CUDA_HEAD_SIZES "192x128;128x128;64x64;256x256" CACHE STRING
  "Head sizes (query and key x value) that tensor-core kernels are compiled for, multiples of 64, e.g. 192x128;256x256")

set(instance_dir ${CMAKE_CURRENT_LIST_DIR})
set(instance_out ${CMAKE_CURRENT_BINARY_DIR}/cuda/instances)
set(rows "")
foreach(sizes ${DIFFKV_CUDA_HEAD_SIZES})
  if(NOT sizes MATCHES "^([0-9]+)x([0-9]+)$")
    message(FATAL_ERROR "DIFFKV_CUDA_HEAD_SIZES holds '${sizes}', expected e.g. 192x128")
  endif()
  set(head_size_qk ${CMAKE_MATCH_1})
  set(head_size_v ${CMAKE_MATCH_2})
  foreach(stored kBF16 kF16 kE4M3 kE5M2)
    set(file ${instance_out}/mma_${stored}_${sizes}.cu)
    configure_file(${instance_dir}/instance.cu.in ${file} @ONLY)
    if(stored STREQUAL "kE4M3")
      target_sources(diffkv_cuda_fp8 PRIVATE ${file})
    else()
      target_sources(diffkv_cuda PRIVATE ${file})
    endif()
    string(APPEND rows "      {DType::${stored}, ${head_size_qk}, ${head_size_v},\n"
      "       mma::kernel<DType::${stored}, ${head_size_qk}, ${head_size_v}>},\n")
  endforeach()
endforeach()
configure_file(${instance_dir}/instances.cc.in ${instance_out}/instances.cc @ONLY)
target_sources(diffkv PRIVATE ${instance_out}/instances.cc cuda/kernel_table.cc cuda/tensor_maps.cc)
