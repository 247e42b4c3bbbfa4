// Leaves that do not decay read another row of hyper, with a decay rate of 0.

// CHECK-LABEL: func.func public @main(
// CHECK: dense<{{.*}}1.000000e+00, 4.000000e-06, 0.899999976{{.*}}1.000000e+00, 0.000000e+00, 0.899999976
// CHECK: %{{[0-9]+}}:3 = stablehlo.composite "adamw_xla.update" {{.*}} {composite_attributes = {amsgrad = false, cautious = false, clip_value = false, delta = false, ema = false, ema_overwrite = false, epsilon_root = false, group = 0 : i64, leaf = 0 : i64, leaf_scale = false, nesterov = false, skip = false, split_master = false, stochastic = false, words = false}, decomposition = @[[F:[a-z0-9_]+]]} :
// CHECK: %{{[0-9]+}}:3 = stablehlo.composite "adamw_xla.update" {{.*}} {composite_attributes = {amsgrad = false, cautious = false, clip_value = false, delta = false, ema = false, ema_overwrite = false, epsilon_root = false, group = 1 : i64, leaf = 1 : i64, leaf_scale = false, nesterov = false, skip = false, split_master = false, stochastic = false, words = false}, decomposition = @[[F]]} :
// CHECK: %{{[0-9]+}}:3 = stablehlo.composite "adamw_xla.update" {{.*}} {composite_attributes = {amsgrad = false, cautious = false, clip_value = false, delta = false, ema = false, ema_overwrite = false, epsilon_root = false, group = 1 : i64, leaf = 2 : i64, leaf_scale = false, nesterov = false, skip = false, split_master = false, stochastic = false, words = false}, decomposition = @[[H:[a-z0-9_]+]]} :
// CHECK-NOT: stablehlo.composite

// COM: one function for the two leaves that are alike
// CHECK: func.func private @[[F]](%[[ROW:[a-z0-9_]+]]: tensor<1x17xf32>, %[[P:[a-z0-9_]+]]: tensor<2x3xf32>, %[[GRAD:[a-z0-9_]+]]: tensor<2x3xf32>, %[[M:[a-z0-9_]+]]: tensor<2x3xf32>, %[[V:[a-z0-9_]+]]: tensor<2x3xf32>)

// COM: g <- GRAD_SCALE * leaf_scale * g, clamped
// CHECK: %[[SCALES:[a-z0-9_]+]] = stablehlo.slice %[[ROW]] [0:1, 0:1] :
// CHECK: %[[SCALER:[a-z0-9_]+]] = stablehlo.reshape %[[SCALES]] :
// CHECK: %[[SCALE:[a-z0-9_]+]] = stablehlo.broadcast_in_dim %[[SCALER]], dims = [] :
// CHECK: %[[G0:[a-z0-9_]+]] = stablehlo.multiply %[[GRAD]], %[[SCALE]] :

// COM: m <- BETA_1*m + ONE_MINUS_BETA_1*g
// CHECK: %[[B1S:[a-z0-9_]+]] = stablehlo.slice %[[ROW]] [0:1, 4:5] :
// CHECK: %[[B1R:[a-z0-9_]+]] = stablehlo.reshape %[[B1S]] :
// CHECK: %[[B1:[a-z0-9_]+]] = stablehlo.broadcast_in_dim %[[B1R]], dims = [] :
// CHECK: %[[C1S:[a-z0-9_]+]] = stablehlo.slice %[[ROW]] [0:1, 5:6] :
// CHECK: %[[C1R:[a-z0-9_]+]] = stablehlo.reshape %[[C1S]] :
// CHECK: %[[C1:[a-z0-9_]+]] = stablehlo.broadcast_in_dim %[[C1R]], dims = [] :
// CHECK: %[[MA:[a-z0-9_]+]] = stablehlo.multiply %[[B1]], %[[M]] :
// CHECK: %[[MB:[a-z0-9_]+]] = stablehlo.multiply %[[C1]], %[[G0]] :
// CHECK: %[[NEWM:[a-z0-9_]+]] = stablehlo.add %[[MA]], %[[MB]] :

// COM: v <- BETA_2*v + ONE_MINUS_BETA_2*g*g
// CHECK: %[[B2S:[a-z0-9_]+]] = stablehlo.slice %[[ROW]] [0:1, 6:7] :
// CHECK: %[[B2R:[a-z0-9_]+]] = stablehlo.reshape %[[B2S]] :
// CHECK: %[[B2:[a-z0-9_]+]] = stablehlo.broadcast_in_dim %[[B2R]], dims = [] :
// CHECK: %[[C2S:[a-z0-9_]+]] = stablehlo.slice %[[ROW]] [0:1, 7:8] :
// CHECK: %[[C2R:[a-z0-9_]+]] = stablehlo.reshape %[[C2S]] :
// CHECK: %[[C2:[a-z0-9_]+]] = stablehlo.broadcast_in_dim %[[C2R]], dims = [] :
// CHECK: %[[GG:[a-z0-9_]+]] = stablehlo.multiply %[[G0]], %[[G0]] :
// CHECK: %[[VA:[a-z0-9_]+]] = stablehlo.multiply %[[B2]], %[[V]] :
// CHECK: %[[VB:[a-z0-9_]+]] = stablehlo.multiply %[[C2]], %[[GG]] :
// CHECK: %[[NEWV:[a-z0-9_]+]] = stablehlo.add %[[VA]], %[[VB]] :

// COM: p <- p - (DECAY_RATE*p + STEP_SIZE*m / (sqrt(w)*V_CORRECTION + EPSILON))
// CHECK: %[[ROOT:[a-z0-9_]+]] = stablehlo.sqrt %[[NEWV]] :
// CHECK: %[[VCS:[a-z0-9_]+]] = stablehlo.slice %[[ROW]] [0:1, 2:3] :
// CHECK: %[[VCR:[a-z0-9_]+]] = stablehlo.reshape %[[VCS]] :
// CHECK: %[[VC:[a-z0-9_]+]] = stablehlo.broadcast_in_dim %[[VCR]], dims = [] :
// CHECK: %[[CORRECTED:[a-z0-9_]+]] = stablehlo.multiply %[[ROOT]], %[[VC]] :
// CHECK: %[[SSS:[a-z0-9_]+]] = stablehlo.slice %[[ROW]] [0:1, 1:2] :
// CHECK: %[[SSR:[a-z0-9_]+]] = stablehlo.reshape %[[SSS]] :
// CHECK: %[[SS:[a-z0-9_]+]] = stablehlo.broadcast_in_dim %[[SSR]], dims = [] :
// CHECK: %[[TOP:[a-z0-9_]+]] = stablehlo.multiply %[[SS]], %[[NEWM]] :
// CHECK: %[[EPSS:[a-z0-9_]+]] = stablehlo.slice %[[ROW]] [0:1, 8:9] :
// CHECK: %[[EPSR:[a-z0-9_]+]] = stablehlo.reshape %[[EPSS]] :
// CHECK: %[[EPS:[a-z0-9_]+]] = stablehlo.broadcast_in_dim %[[EPSR]], dims = [] :
// CHECK: %[[BOTTOM:[a-z0-9_]+]] = stablehlo.add %[[CORRECTED]], %[[EPS]] :
// CHECK: %[[STEP:[a-z0-9_]+]] = stablehlo.divide %[[TOP]], %[[BOTTOM]] :
// CHECK: %[[DRS:[a-z0-9_]+]] = stablehlo.slice %[[ROW]] [0:1, 3:4] :
// CHECK: %[[DRR:[a-z0-9_]+]] = stablehlo.reshape %[[DRS]] :
// CHECK: %[[DR:[a-z0-9_]+]] = stablehlo.broadcast_in_dim %[[DRR]], dims = [] :
// CHECK: %[[DECAY:[a-z0-9_]+]] = stablehlo.multiply %[[DR]], %[[P]] :
// CHECK: %[[CHANGE:[a-z0-9_]+]] = stablehlo.add %[[DECAY]], %[[STEP]] :
// CHECK: %[[NEWP:[a-z0-9_]+]] = stablehlo.subtract %[[P]], %[[CHANGE]] :
// CHECK-NEXT: return %[[NEWP]], %[[NEWM]], %[[NEWV]] :
// CHECK-NOT: stablehlo.composite
