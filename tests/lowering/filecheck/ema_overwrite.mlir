// The overwrite is data: a slot of hyper.

// CHECK-LABEL: func.func public @main(
// CHECK: %{{[0-9]+}}:4 = stablehlo.composite "adamw_xla.update" {{.*}} {composite_attributes = {amsgrad = false, cautious = false, clip_value = false, delta = false, ema = true, ema_overwrite = true, epsilon_root = false, group = 0 : i64, leaf = 0 : i64, leaf_scale = false, nesterov = false, skip = false, split_master = false, stochastic = false, words = false}, decomposition = @[[F:[a-z0-9_]+]]} :
// CHECK: %{{[0-9]+}}:4 = stablehlo.composite "adamw_xla.update" {{.*}} {composite_attributes = {amsgrad = false, cautious = false, clip_value = false, delta = false, ema = true, ema_overwrite = true, epsilon_root = false, group = 0 : i64, leaf = 1 : i64, leaf_scale = false, nesterov = false, skip = false, split_master = false, stochastic = false, words = false}, decomposition = @[[F]]} :
// CHECK: %{{[0-9]+}}:4 = stablehlo.composite "adamw_xla.update" {{.*}} {composite_attributes = {amsgrad = false, cautious = false, clip_value = false, delta = false, ema = true, ema_overwrite = true, epsilon_root = false, group = 0 : i64, leaf = 2 : i64, leaf_scale = false, nesterov = false, skip = false, split_master = false, stochastic = false, words = false}, decomposition = @[[H:[a-z0-9_]+]]} :
// CHECK-NOT: stablehlo.composite

// COM: one function for the two leaves that are alike
// CHECK: func.func private @[[F]](%[[ROW:[a-z0-9_]+]]: tensor<1x17xf32>, %[[P:[a-z0-9_]+]]: tensor<2x3xf32>, %[[GRAD:[a-z0-9_]+]]: tensor<2x3xf32>, %[[M:[a-z0-9_]+]]: tensor<2x3xf32>, %[[V:[a-z0-9_]+]]: tensor<2x3xf32>, %[[E:[a-z0-9_]+]]: tensor<2x3xf32>)

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

// COM: e <- EMA_MOMENTUM*e + ONE_MINUS_EMA_MOMENTUM*p
// CHECK: %[[EMS:[a-z0-9_]+]] = stablehlo.slice %[[ROW]] [0:1, 10:11] :
// CHECK: %[[EMR:[a-z0-9_]+]] = stablehlo.reshape %[[EMS]] :
// CHECK: %[[EM:[a-z0-9_]+]] = stablehlo.broadcast_in_dim %[[EMR]], dims = [] :
// CHECK: %[[ECS:[a-z0-9_]+]] = stablehlo.slice %[[ROW]] [0:1, 11:12] :
// CHECK: %[[ECR:[a-z0-9_]+]] = stablehlo.reshape %[[ECS]] :
// CHECK: %[[EC:[a-z0-9_]+]] = stablehlo.broadcast_in_dim %[[ECR]], dims = [] :
// CHECK: %[[EA:[a-z0-9_]+]] = stablehlo.multiply %[[EM]], %[[E]] :
// CHECK: %[[EB:[a-z0-9_]+]] = stablehlo.multiply %[[EC]], %[[NEWP]] :
// CHECK: %[[NEWE:[a-z0-9_]+]] = stablehlo.add %[[EA]], %[[EB]] :

// COM: p <- e on an overwrite step
// CHECK: %[[OVERFS:[a-z0-9_]+]] = stablehlo.slice %[[ROW]] [0:1, 12:13] :
// CHECK: %[[OVERFR:[a-z0-9_]+]] = stablehlo.reshape %[[OVERFS]] :
// CHECK: %[[OVERF:[a-z0-9_]+]] = stablehlo.broadcast_in_dim %[[OVERFR]], dims = [] :
// CHECK: %[[OVER:[a-z0-9_]+]] = stablehlo.compare NE, %[[OVERF]], 
// CHECK: %[[OUTP:[a-z0-9_]+]] = stablehlo.select %[[OVER]], %[[NEWE]], %[[NEWP]] :
// CHECK-NEXT: return %[[OUTP]], %[[NEWM]], %[[NEWV]], %[[NEWE]] :
// CHECK-NOT: stablehlo.composite
